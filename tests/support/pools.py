"""All that can be seen of a page pool, before and after."""

import pytest


def snapshot(pool, seqs):
    """All that can be seen of a pool."""
    return (
        pool.stats(),
        [(seq, pool.length(seq), pool.committed(seq), pool.depths(seq), pool.pages(seq)) for seq in seqs],
        [pool.num_published(seq) for seq in seqs],
        [(pool.ref_count(page), pool.page_name(page)) for page in range(pool.num_pages)],
    )


def assert_raises_unchanged(error, match, pool, seqs, call):
    before = snapshot(pool, seqs)
    with pytest.raises(error, match=match) as caught:
        call()
    assert snapshot(pool, seqs) == before
    pool.check_integrity()
    return caught.value
