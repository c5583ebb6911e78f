"""The page pool against a plain Python model, in random walks of all its moves, wrong ones too.

``make fuzz`` walks further: LAYERSKIP_FUZZ_STEPS steps instead of the least, 20,000. A failure prints the shortest walk
that fails, and a line that reproduces it.
"""

from collections import Counter
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from layerskip_kernels._kv import CacheFull, PagePool

from support.pools import assert_raises_unchanged
from support.random_walks import MOST_STEPS, walk

STEPS_PER_WALK = 80
SALTS = [None, b"", b"tenant"]
taken = Counter()  # steps of all walks, by name


class Page:
    """What a page holds: a mark for each row written, the tokens it is found by, how many texts have it."""

    def __init__(self, marks=(), name=None):
        self.marks, self.name, self.owners, self.id = list(marks), name, 1, None


class Text:
    """One sequence: tokens of its rows, the first of them committed."""

    def __init__(self, salt=None, tokens=(), pages=()):
        self.salt, self.tokens, self.pages = salt, list(tokens), list(pages)
        self.committed, self.depths, self.published = len(self.tokens), [], len(self.pages)
        self.swapped = None  # (tokens, marks) outside the pool

    @property
    def length(self):
        return len(self.tokens)


class PoolModel:
    """The contract in a few lines: pages are objects, shared by reference; the oldest cached one goes first."""

    def __init__(self, num_pages, page_size, num_layers):
        self.num_pages, self.page_size, self.num_layers = num_pages, page_size, num_layers
        self.texts = {}
        self.found_by = {}  # (salt, tokens from the start) -> page
        self.cached = []  # pages without owners, least recently used first
        self.evictions = self.copies = self.hits = self.num_marks = 0

    @property
    def owned(self):
        return {id(page): page for text in self.texts.values() for page in text.pages}

    @property
    def num_available(self):
        return self.num_pages - len(self.owned)

    def name(self, text, index):
        return text.salt, tuple(text.tokens[: (index + 1) * self.page_size])

    def add(self, seq, tokens, salt):
        text = Text(salt)
        while (len(text.pages) + 1) * self.page_size < len(tokens):
            page = self.found_by.get((salt, tuple(tokens[: (len(text.pages) + 1) * self.page_size])))
            if page is None:
                break
            text.pages.append(page)
        self.texts[seq] = Text(salt, tokens[: len(text.pages) * self.page_size], text.pages)
        self.hits += self.texts[seq].length
        for page in text.pages:
            self.retain(page)

    def fork(self, seq, new):
        text = self.texts[seq]
        self.texts[new] = Text(text.salt, text.tokens, text.pages)
        self.texts[new].published = text.published
        for page in text.pages:
            self.retain(page)

    def retain(self, page):
        if page.owners == 0:
            self.cached.remove(page)
        page.owners += 1

    def release(self, page):
        page.owners -= 1
        if page.owners == 0 and page.name is not None:
            self.cached.append(page)

    def pages_needed(self, seqs, counts):
        owners = Counter()
        needed = 0
        for text, count in zip([self.texts[seq] for seq in seqs], counts, strict=True):
            needed += -(-(text.length + count) // self.page_size) - len(text.pages)
            if self.writes_inside(text, count):
                page = text.pages[-1]
                needed += page.owners - owners[id(page)] > 1
                owners[id(page)] += page.owners - owners[id(page)] > 1
        return needed

    def writes_inside(self, text, count):
        return count > 0 and text.length % self.page_size != 0

    def append(self, seqs, counts, tokens):
        needed = self.pages_needed(seqs, counts)
        while self.num_pages - len(self.owned) - len(self.cached) < needed:
            page = self.cached.pop(0)
            del self.found_by[page.name]
            self.evictions += 1
        for seq, count in zip(seqs, counts, strict=True):
            text = self.texts[seq]
            if self.writes_inside(text, count):
                self.make_own(text)
            for _ in range(count):
                self.add_row(text, tokens.pop())

    def make_own(self, text):
        """The last page, for a write."""
        page = text.pages[-1]
        if page.owners > 1:
            page.owners -= 1
            text.pages[-1] = page = Page(page.marks)
            self.copies += 1
        elif page.name is not None:
            del self.found_by[page.name]
            page.name = None
        del page.marks[(text.length - 1) % self.page_size + 1 :]

    def add_row(self, text, token):
        if text.length % self.page_size == 0:
            text.pages.append(Page())
        text.pages[-1].marks.append(self.num_marks)
        text.tokens.append(token)
        text.depths.append(0)
        self.num_marks += 1

    def raise_rows(self, seqs, stops, depth):
        for text, stop in zip([self.texts[seq] for seq in seqs], stops, strict=True):
            for row in range(stop - text.committed):
                text.depths[row] = max(text.depths[row], depth)

    def commit(self, seqs, lengths):
        for seq, length in zip(seqs, lengths, strict=True):
            self.cut(seq, length)
            self.texts[seq].committed, self.texts[seq].depths = length, []

    def publish(self, seq, count):
        text = self.texts[seq]
        for index in range(text.published, text.published + count):
            page, name = text.pages[index], self.name(text, index)
            if name not in self.found_by:
                self.found_by[name], page.name = page, name
        text.published += count

    def cut(self, seq, new_length):
        text = self.texts[seq]
        del text.tokens[new_length:]
        text.committed = min(text.committed, new_length)
        del text.depths[new_length - text.committed :]
        text.published = min(text.published, text.committed // self.page_size)
        while len(text.pages) > -(-new_length // self.page_size):
            self.release(text.pages.pop())

    def marks(self, seq):
        text = self.texts[seq]
        return [text.pages[i // self.page_size].marks[i % self.page_size] for i in range(text.length)]


class PagePoolMachine(RuleBasedStateMachine):
    """`storage` plays the K/V tensors: a row's mark by its slot, so that a page given to two writers, moved under a
    row or not copied shows as a row that reads back another mark.

    One number says which move is made, and how: a rule of Hypothesis for each would take most of the time.
    """

    @initialize(num_pages=st.integers(1, 12), page_size=st.sampled_from([3, 2, 4, 1]), num_layers=st.integers(1, 3))
    def start(self, num_pages, page_size, num_layers):
        self.storage, self.last_id = {}, -1
        self.pool = PagePool(num_pages, page_size, num_layers, identity=b"model", copy_page=self.copy_page)
        self.model = PoolModel(num_pages, page_size, num_layers)
        for _ in range(2):
            self.add_text([], None)

    def copy_page(self, source, target):
        size = self.pool.page_size
        for offset in range(size):
            self.storage[target * size + offset] = self.storage.get(source * size + offset)

    @rule(number=st.integers(0, 2**20))
    def step(self, number):
        random = Random(number)
        more = [self.add, self.add_with_a_known_beginning, self.fork] if len(self.texts) < 8 else []
        fewer = [self.free] if len(self.texts) > 2 else []
        out = [seq for seq, text in sorted(self.texts.items()) if text.swapped and not text.length]
        moves = [self.append, self.raise_rows, self.commit, self.publish, self.decode, self.decode, self.truncate]
        moves += [self.rollback, self.swap_out, *([self.swap_in] if out else [])]
        random.choice(more + fewer + moves)(random)

    @property
    def texts(self):
        return self.model.texts

    def some(self, random):
        """A sequence."""
        return random.choice(sorted(self.texts))

    def batch(self, random):
        """Distinct sequences, in any order."""
        return random.sample(sorted(self.texts), random.randint(1, min(4, len(self.texts))))

    def values(self, random, ranges):
        """One value in each low..high; in a fourth of all calls also one below or above it."""
        wrong = random.random() < 0.25
        return [random.randint(low - wrong, high + wrong) for low, high in ranges]

    def call(self, error, method, *args):
        """Calls a method that must raise `error` (None: nothing); True when the move was made."""
        taken[method.__name__] += 1
        if error is None:
            method(*args)
            return True
        taken["refused"] += 1
        assert_raises_unchanged(error, None, self.pool, self.texts, lambda: method(*args))
        return False

    def new(self, seq):
        assert seq > self.last_id
        self.last_id = seq
        return seq

    def new_tokens(self, random, count):
        """Few kinds, so that texts begin alike."""
        return [random.randint(0, 1) for _ in range(count)]

    def add_text(self, tokens, salt):
        taken["add_sequence"] += 1
        self.model.add(self.new(self.pool.add_sequence(tokens, salt)), tokens, salt)

    def add(self, random):
        self.add_text(self.new_tokens(random, random.randint(0, 14)), random.choice(SALTS))

    def add_with_a_known_beginning(self, random):
        text = random.choice([self.texts[seq] for seq in sorted(self.texts)])
        self.add_text(text.tokens + self.new_tokens(random, random.randint(0, 4)), text.salt)

    def fork(self, random):
        taken["fork"] += 1
        partly = [seq for seq, text in sorted(self.texts.items()) if text.committed % self.pool.page_size]
        seq = random.choice(partly or sorted(self.texts))
        if self.texts[seq].depths and random.random() < 0.5:
            assert_raises_unchanged(ValueError, "pending", self.pool, self.texts, lambda: self.pool.fork(seq))
            return
        self.drop_pending(seq)
        new = self.new(self.pool.fork(seq))
        self.model.fork(seq, new)
        self.append_to(random, random.choice([[seq], [new], [new, seq], []]))

    def drop_pending(self, seq):
        self.pool.rollback(seq)
        self.model.cut(seq, self.texts[seq].committed)

    def free(self, random):
        taken["free_sequence"] += 1
        seq = self.some(random)
        self.pool.free_sequence(seq)
        self.model.cut(seq, 0)
        del self.texts[seq]

    def append(self, random):
        self.append_to(random, self.batch(random))

    def append_to(self, random, seqs):
        counts = self.values(random, [(0, 6)] * len(seqs))
        tokens = self.new_tokens(random, sum(map(abs, counts)))
        error = ValueError if min(counts, default=0) < 0 else None
        if error is None:
            needed = self.model.pages_needed(seqs, counts)
            assert self.pool.pages_needed(seqs, counts) == needed
            error = CacheFull if needed > self.model.num_available else None
        if self.call(error, self.pool.append, seqs, counts):
            self.model.append(seqs, counts, tokens)
            for seq, count in zip(seqs, counts, strict=True):
                self.write(seq, self.texts[seq].length - count)

    def slots(self, seq, start, stop):
        """Where the rows of a sequence are kept, by its page table."""
        pages, size = self.pool.pages(seq), self.pool.page_size
        return [pages[position // size] * size + position % size for position in range(start, stop)]

    def write(self, seq, start):
        marks = self.model.marks(seq)
        self.storage |= zip(self.slots(seq, start, len(marks)), marks[start:], strict=True)

    def raise_rows(self, random):
        seqs = self.batch(random)
        texts = [self.texts[seq] for seq in seqs]
        depth = random.randint(0, 4)
        stops = self.values(random, [(text.committed, text.length) for text in texts])
        good = 1 <= depth <= self.pool.num_layers
        good &= all(text.committed <= stop <= text.length for text, stop in zip(texts, stops, strict=True))
        if self.call(None if good else ValueError, self.pool.raise_rows, seqs, stops, depth):
            self.model.raise_rows(seqs, stops, depth)

    def commit(self, random):
        seqs = self.batch(random)
        texts = [self.texts[seq] for seq in seqs]
        if random.random() < 0.7:
            self.raise_all(seqs)
        lengths = self.values(random, [(text.committed, text.length) for text in texts])
        good = all(text.committed <= n <= text.length for text, n in zip(texts, lengths, strict=True)) and all(
            depth == self.pool.num_layers
            for text, n in zip(texts, lengths, strict=True)
            for depth in text.depths[: n - text.committed]
        )
        if self.call(None if good else ValueError, self.pool.commit, seqs, lengths):
            self.model.commit(seqs, lengths)

    def raise_all(self, seqs):
        lengths = [self.texts[seq].length for seq in seqs]
        self.pool.raise_rows(seqs, lengths, self.pool.num_layers)
        self.model.raise_rows(seqs, lengths, self.pool.num_layers)

    def publish(self, random):
        seq = self.some(random)
        text, size = self.texts[seq], self.pool.page_size
        count = random.randint(0, text.committed // size - text.published + (random.random() < 0.1))
        start, stop = text.published * size, (text.published + count) * size
        good = stop <= text.committed
        tokens = text.tokens[start:stop] if good else [0] * (stop - start)
        if self.call(None if good else ValueError, self.pool.publish, seq, tokens):
            self.model.publish(seq, count)

    def decode(self, random):
        """As PagedKVCache does it: some rows through all layers, the accepted ones committed and published."""
        for seq in self.batch(random):
            text, count = self.texts[seq], random.randint(1, 9)
            if self.model.pages_needed([seq], [count]) > self.model.num_available:
                continue
            taken["decode"] += 1
            self.grow(seq, self.new_tokens(random, count))
            self.raise_all([seq])
            length = random.randint(text.committed, text.length)
            self.pool.commit([seq], [length])
            self.model.commit([seq], [length])
            self.publish_all(seq)

    def grow(self, seq, tokens):
        start = self.texts[seq].length
        self.pool.append([seq], [len(tokens)])
        self.model.append([seq], [len(tokens)], tokens)
        self.write(seq, start)

    def publish_all(self, seq):
        text, size = self.texts[seq], self.pool.page_size
        self.pool.publish(seq, text.tokens[text.published * size : text.committed // size * size])
        self.model.publish(seq, text.committed // size - text.published)

    def truncate(self, random):
        seq = self.some(random)
        length = self.texts[seq].length
        [new_length] = self.values(random, [(0, length)])
        if self.call(None if 0 <= new_length <= length else ValueError, self.pool.truncate, seq, new_length):
            self.model.cut(seq, new_length)

    def rollback(self, random):
        taken["rollback"] += 1
        self.drop_pending(self.some(random))

    def swap_out(self, random):
        """As PagedKVCache does it: the rows are kept elsewhere, the sequence stays, without any."""
        taken["swap_out"] += 1
        seq = self.some(random)
        text = self.texts[seq]
        text.swapped = (
            text.tokens[: text.committed],
            [self.storage[slot] for slot in self.slots(seq, 0, text.committed)],
        )
        self.pool.truncate(seq, 0)
        self.model.cut(seq, 0)

    def swap_in(self, random):
        out = [seq for seq, text in sorted(self.texts.items()) if text.swapped and not text.length]
        seq = random.choice(out)
        text = self.texts[seq]
        tokens, marks = text.swapped
        full = self.model.pages_needed([seq], [len(tokens)]) > self.model.num_available
        if not self.call(CacheFull if full else None, self.pool.append, [seq], [len(tokens)]):
            return
        taken["swap_in"] += 1
        self.model.append([seq], [len(tokens)], tokens[::-1])
        for i, mark in enumerate(marks):
            text.pages[i // self.pool.page_size].marks[i % self.pool.page_size] = mark
        self.write(seq, 0)
        self.raise_all([seq])
        self.pool.commit([seq], [len(tokens)])
        self.model.commit([seq], [len(tokens)])

    def teardown(self):
        if hasattr(self, "model"):  # a walk may end before its first step
            taken.update(evictions=self.model.evictions, copies=self.model.copies, hits=self.model.hits)

    @invariant()
    def counts_match(self):
        taken["steps"] += 1
        self.pool.check_integrity()
        model, stats = self.model, self.pool.stats()
        owned = list(model.owned.values())
        assert stats["num_cached"] == len(model.cached) == self.pool.num_cached
        assert stats["num_owned"] == len(owned)
        assert stats["num_free"] == model.num_pages - len(owned) - len(model.cached) == self.pool.num_free
        assert stats["num_shared"] == sum(page.owners > 1 for page in owned)
        assert stats["num_sequences"] == len(model.texts)
        assert (stats["num_evictions"], stats["num_copies"], stats["hit_tokens"]) == (
            model.evictions, model.copies, model.hits,
        )  # fmt: skip
        assert stats["unused_positions"] < self.pool.page_size * max(1, len(model.texts))

    @invariant()
    def sequences_match(self):
        seqs, pool = sorted(self.texts), self.pool
        texts = [self.texts[seq] for seq in seqs]
        assert pool.lengths(seqs).tolist() == [text.length for text in texts]
        assert pool.committed_lengths(seqs).tolist() == [text.committed for text in texts]
        depths, starts = pool.pending_depths(seqs)
        table = pool.block_table(seqs).tolist()
        for row, (seq, text) in enumerate(zip(seqs, texts, strict=True)):
            assert depths[starts[row] : starts[row + 1]].tolist() == text.depths
            assert pool.num_published(seq) == text.published
            assert len(text.pages) == len(table[row]) - table[row].count(-1)
            self.pages_match(text.pages, table[row])
        for page in self.model.cached:
            assert (pool.ref_count(page.id), pool.page_name(page.id) is None) == (0, False)

    def pages_match(self, pages, ids):
        """A page of the model is one page of the pool as long as it lives, with the same owners, name and rows."""
        size = self.pool.page_size
        for page, number in zip(pages, ids, strict=False):
            page.id = number if page.id is None else page.id
            assert page.id == number
            assert (self.pool.ref_count(number), self.pool.page_name(number) is None) == (
                page.owners, page.name is None,
            )  # fmt: skip
            assert [self.storage[number * size + i] for i in range(len(page.marks))] == page.marks


def test_random_walks():
    moves = "add_sequence append commit copies decode evictions fork free_sequence hits publish raise_rows refused "
    moves += "rollback swap_in swap_out truncate"
    walk(PagePoolMachine, taken, MOST_STEPS, STEPS_PER_WALK, moves)
