// layerskip_kernels._kv: the page pool for Python, batches out as numpy arrays (copies, owned by numpy).
//
// Every call lets go of the GIL before it takes the pool's mutex, because copy_page asks for the GIL under that mutex.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "page_pool.h"

namespace py = pybind11;
using layerskip::BlockTable;
using layerskip::CacheFull;
using layerskip::PageId;
using layerskip::PagePool;
using layerskip::PendingDepths;
using layerskip::PoolStats;
using layerskip::SequenceId;

namespace {

using Released = py::call_guard<py::gil_scoped_release>;

template <typename Act>
auto WithoutGil(Act act) {
  const py::gil_scoped_release released;
  return act();
}

PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> cache_full_type;

template <typename T>
py::array_t<T> ToNumpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<int32_t> BlockTableToNumpy(const PagePool& pool, const std::vector<SequenceId>& seqs) {
  const BlockTable table = WithoutGil([&] { return pool.MakeBlockTable(seqs); });
  return py::array_t<int32_t>({table.rows, table.columns}, table.entries.data());
}

py::tuple PendingDepthsToNumpy(const PagePool& pool, const std::vector<SequenceId>& seqs) {
  const PendingDepths pending = WithoutGil([&] { return pool.MakePendingDepths(seqs); });
  return py::make_tuple(ToNumpy(pending.depths), ToNumpy(pending.starts));
}

std::optional<py::bytes> NameOf(const PagePool& pool, int64_t page) {
  const auto name = WithoutGil([&] { return pool.NameOf(page); });
  if (!name) return std::nullopt;
  return py::bytes(reinterpret_cast<const char*>(name->data()), name->size());
}

py::dict StatsToDict(const PagePool& pool) {
  const PoolStats stats = WithoutGil([&] { return pool.Stats(); });
  py::dict dict;
  dict["num_free"] = stats.num_free;
  dict["num_cached"] = stats.num_cached;
  dict["num_owned"] = stats.num_owned;
  dict["num_shared"] = stats.num_shared;
  dict["num_sequences"] = stats.num_sequences;
  dict["used_positions"] = stats.used_positions;
  dict["unused_positions"] = stats.unused_positions;
  dict["queried_tokens"] = stats.queried_tokens;
  dict["hit_tokens"] = stats.hit_tokens;
  dict["num_evictions"] = stats.num_evictions;
  dict["num_copies"] = stats.num_copies;
  return dict;
}

std::string Repr(const PagePool& pool) {
  std::ostringstream out;
  out << "PagePool(num_pages=" << pool.num_pages() << ", page_size=" << pool.page_size()
      << ", num_layers=" << pool.num_layers() << "; num_free=" << pool.num_free()
      << ", num_cached=" << pool.num_cached() << ", num_sequences=" << pool.num_sequences() << ")";
  return out.str();
}

void RaiseCacheFull(const CacheFull& error) {
  const py::object& type = cache_full_type.get_stored();
  py::object value = type(error.what());
  value.attr("needed") = error.needed;
  value.attr("free") = error.free;
  PyErr_SetObject(type.ptr(), value.ptr());
}

void BindCacheFull(py::module_& m) {
  cache_full_type.call_once_and_store_result(
      [&]() -> py::object { return py::exception<CacheFull>(m, "CacheFull", PyExc_RuntimeError); });
  cache_full_type.get_stored().attr("__doc__") =
      "Pages ran short, and nothing was changed: ``needed`` pages for the whole call, ``free`` ones left.";
  py::register_local_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const CacheFull& error) {
      RaiseCacheFull(error);
    }
  });
}

void BindSequences(py::class_<PagePool>& pool) {
  pool.def("add_sequence", &PagePool::AddSequence, py::arg("tokens") = py::list(), py::arg("salt") = py::none(),
           Released(),
           R"(Adds a sequence. Returns its id, never used again.

It is empty; but in a pool with an identity it begins with the committed pages found for ``tokens`` (int32) under
the same ``salt`` (bytes or None), at least the last token being left to compute.)");
  pool.def(
      "fork", &PagePool::Fork, py::arg("seq"), Released(),
      R"(Adds a sequence with the same rows on the same pages; ``append`` copies a shared page before rows go into it.

Raises ValueError for an unknown id and for pending rows.)");
  pool.def("free_sequence", &PagePool::FreeSequence, py::arg("seq"), Released(),
           R"(Removes a sequence and releases its pages; published ones stay cached until they are needed.

Raises ValueError for an unknown id.)");
  pool.def("publish", &PagePool::Publish, py::arg("seq"), py::arg("tokens"), Released(),
           R"(Names the next full committed pages of a sequence, from ``num_published`` on, by their tokens (int32).

``add_sequence`` finds them from now on. Raises ValueError for an unknown id, tokens that are no multiple of
page_size, beyond the committed rows or other ones than a fork published, and in a pool without an identity.)");
  pool.def("num_published", &PagePool::NumPublished, py::arg("seq"), Released(),
           "First pages of a sequence that were published or found. Raises ValueError for an unknown id.");
}

void BindMoves(py::class_<PagePool>& pool) {
  pool.def("append", &PagePool::Append, py::arg("seqs"), py::arg("counts"), Released(),
           R"(Adds ``counts[i]`` (at least 0) pending rows of depth 0 to the end of ``seqs[i]``.

A shared page that the new rows begin in is copied first, with ``copy_page``.
Raises CacheFull when the pages do not suffice for the whole batch; ValueError for an unknown or
repeated id, a negative count, or lists of different lengths. A call that raises changes nothing.)");
  pool.def("pages_needed", &PagePool::PagesNeeded, py::arg("seqs"), py::arg("counts"), Released(),
           "Pages that ``append`` of the same arguments would take, copies included; raises ValueError as it does.");
  pool.def("raise_rows", &PagePool::RaiseRows, py::arg("seqs"), py::arg("stops"), py::arg("depth"), Released(),
           R"(Raises every shallower pending row of ``seqs[i]`` at a position below ``stops[i]`` to ``depth``.

``depth`` counts layers passed, in 1..num_layers; ``stops[i]`` is in committed..length. Rows from
``stops[i]`` on keep their depth, so a staircase stays one.

Raises ValueError for a depth or a stop out of range, an unknown or repeated id, or lists of different
lengths. A call that raises changes nothing.)");
  pool.def("commit", &PagePool::Commit, py::arg("seqs"), py::arg("lengths"), Released(),
           R"(Commits the rows of ``seqs[i]`` below ``lengths[i]``; all rows beyond vanish, their pages too.

``lengths[i]`` is in committed..length, and every row below it has passed all ``num_layers`` layers.

Raises ValueError for a length out of range, a row not deep enough, an unknown or repeated id, or lists
of different lengths. A call that raises changes nothing.)");
  pool.def("truncate", &PagePool::Truncate, py::arg("seq"), py::arg("new_length"), Released(),
           R"(Cuts a sequence to ``new_length`` rows, committed ones too, and releases the pages beyond.

Raises ValueError unless 0 <= new_length <= length, and for an unknown id.)");
  pool.def("rollback", &PagePool::Rollback, py::arg("seq"), Released(),
           R"(Drops all pending rows and releases the pages beyond the committed ones.

Raises ValueError for an unknown id.)");
}

void BindReads(py::class_<PagePool>& pool) {
  pool.def_property_readonly("num_pages", &PagePool::num_pages, "Pages in the pool.");
  pool.def_property_readonly("page_size", &PagePool::page_size, "Positions per page.");
  pool.def_property_readonly("num_layers", &PagePool::num_layers, "Depth of a committed row.");
  pool.def_property_readonly("shares_prefixes", &PagePool::shares_prefixes, "Whether the pool has an identity.");
  pool.def_property_readonly("num_free", py::cpp_function(&PagePool::num_free, Released()), "Pages that hold nothing.");
  pool.def_property_readonly("num_cached", py::cpp_function(&PagePool::num_cached, Released()),
                             "Published pages that no sequence holds: evicted when no page is free.");
  pool.def_property_readonly("num_available", py::cpp_function(&PagePool::num_available, Released()),
                             "What an append can have: num_free + num_cached.");
  pool.def_property_readonly("num_sequences", py::cpp_function(&PagePool::num_sequences, Released()),
                             "Sequences added and not freed.");
  pool.def("stats", &StatsToDict, "Counts of pages and positions by state, and of events so far: a dict of ints.");
  pool.def("length", &PagePool::Length, py::arg("seq"), Released(),
           "Rows of a sequence, committed and pending. Raises ValueError for an unknown id.");
  pool.def("committed", &PagePool::Committed, py::arg("seq"), Released(),
           "Committed rows of a sequence. Raises ValueError for an unknown id.");
  pool.def("depths", &PagePool::Depths, py::arg("seq"), Released(),
           "Depth of each pending row, first to last: a list. Raises ValueError for an unknown id.");
  pool.def("pages", &PagePool::Pages, py::arg("seq"), Released(),
           "Page ids of a sequence in order of position: a list. Raises ValueError for an unknown id.");
  pool.def("ref_count", &PagePool::RefCount, py::arg("page"), Released(),
           "Table entries that name ``page``. Raises ValueError unless 0 <= page < num_pages.");
  pool.def("page_name", &NameOf, py::arg("page"),
           R"(The SHA-256 (bytes) that the page is found by, None where it is not published.

Raises ValueError unless 0 <= page < num_pages.)");
  pool.def("check_integrity", &PagePool::CheckIntegrity, Released(),
           R"(Proves that the books are in order: free + cached + owned == total, reference counts equal to
table entries, each page in one state only, tables in range and as long as the rows need, depths a
staircase, pages with pending rows not shared, names those of the tokens.

Raises RuntimeError naming what is broken.)");
}

void BindBatchReads(py::class_<PagePool>& pool) {
  pool.def(
      "lengths",
      [](const PagePool& pool, const std::vector<SequenceId>& seqs) {
        return ToNumpy(WithoutGil([&] { return pool.Lengths(seqs); }));
      },
      py::arg("seqs"), "Lengths, int64 [B]. Raises ValueError for an unknown id.");
  pool.def(
      "committed_lengths",
      [](const PagePool& pool, const std::vector<SequenceId>& seqs) {
        return ToNumpy(WithoutGil([&] { return pool.CommittedLengths(seqs); }));
      },
      py::arg("seqs"), "Committed lengths, int64 [B]. Raises ValueError for an unknown id.");
  pool.def("block_table", &BlockTableToNumpy, py::arg("seqs"),
           R"(Page ids, int32 [B, max_blocks], rows padded with -1; max_blocks is at least 1.

Raises ValueError for an unknown id.)");
  pool.def("pending_depths", &PendingDepthsToNumpy, py::arg("seqs"),
           R"(Depths of all pending rows, int32 [T], and query_start_loc, int32 [B + 1].

The rows of ``seqs[i]`` are ``depths[query_start_loc[i]:query_start_loc[i + 1]]``.
Raises ValueError for an unknown id.)");
}

}  // namespace

PYBIND11_MODULE(_kv, m) {
  m.doc() = "The page pool: pages, lengths and depths of the sequences in a paged KV cache. Holds no tensors.";
  m.attr("TORCH") = LAYERSKIP_TORCH;  // the release that the other extensions are built for
  BindCacheFull(m);
  py::class_<PagePool> pool(m, "PagePool",
                            R"(``num_pages`` pages of ``page_size`` positions, shared by sequences.

The first ``committed`` rows of a sequence have passed ``num_layers`` layers; the rows after them are
pending, each with a depth that never rises along the sequence (the staircase).

``identity`` (bytes): what the pages' contents depend on besides tokens; given, sequences of equal beginnings
share pages. ``copy_page(source, target)``: copies the contents of a page, before a write into a shared one;
what it raises, ``append`` raises, with nothing changed. It must not call the pool.

Thread-safe: each call is atomic. One sequence belongs to one thread at a time.)");
  pool.def(py::init([](int64_t num_pages, int64_t page_size, int64_t num_layers, std::optional<py::bytes> identity,
                       std::function<void(PageId, PageId)> copy_page) {
             layerskip::PoolOptions options;
             if (identity) options.identity = std::string(*identity);
             options.copy_page = std::move(copy_page);
             return std::make_unique<PagePool>(num_pages, page_size, num_layers, std::move(options));
           }),
           py::arg("num_pages"), py::arg("page_size"), py::arg("num_layers"), py::kw_only(),
           py::arg("identity") = py::none(), py::arg("copy_page") = py::none(),
           R"(Raises ValueError unless each is at least 1 and num_pages * page_size fits in int32.)");
  pool.def("__repr__", &Repr, Released());
  BindSequences(pool);
  BindMoves(pool);
  BindReads(pool);
  BindBatchReads(pool);
}
