// layerskip_kernels._kv: the page pool for Python, batches out as numpy arrays (copies, owned by numpy).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "page_pool.h"

namespace py = pybind11;
using layerskip::BlockTable;
using layerskip::CacheFull;
using layerskip::PagePool;
using layerskip::PendingDepths;
using layerskip::SequenceId;

namespace {

PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> cache_full_type;

template <typename T>
py::array_t<T> ToNumpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<int32_t> BlockTableToNumpy(const PagePool& pool, const std::vector<SequenceId>& seqs) {
  const BlockTable table = pool.MakeBlockTable(seqs);
  return py::array_t<int32_t>({table.rows, table.columns}, table.entries.data());
}

py::tuple PendingDepthsToNumpy(const PagePool& pool, const std::vector<SequenceId>& seqs) {
  const PendingDepths pending = pool.MakePendingDepths(seqs);
  return py::make_tuple(ToNumpy(pending.depths), ToNumpy(pending.starts));
}

std::string Repr(const PagePool& pool) {
  std::ostringstream out;
  out << "PagePool(num_pages=" << pool.num_pages() << ", page_size=" << pool.page_size()
      << ", num_layers=" << pool.num_layers() << "; num_free=" << pool.num_free()
      << ", num_sequences=" << pool.num_sequences() << ")";
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

void BindMoves(py::class_<PagePool>& pool) {
  pool.def("add_sequence", &PagePool::AddSequence, "Adds an empty sequence. Returns its id, never used again.");
  pool.def("free_sequence", &PagePool::FreeSequence, py::arg("seq"),
           R"(Removes a sequence and releases its pages.

Raises ValueError for an unknown id.)");
  pool.def("append", &PagePool::Append, py::arg("seqs"), py::arg("counts"),
           R"(Adds ``counts[i]`` (at least 0) pending rows of depth 0 to the end of ``seqs[i]``.

Raises CacheFull when the pages do not suffice for the whole batch; ValueError for an unknown or
repeated id, a negative count, or lists of different lengths. A call that raises changes nothing.)");
  pool.def("raise_rows", &PagePool::RaiseRows, py::arg("seqs"), py::arg("stops"), py::arg("depth"),
           R"(Raises every shallower pending row of ``seqs[i]`` at a position below ``stops[i]`` to ``depth``.

``depth`` counts layers passed, in 1..num_layers; ``stops[i]`` is in committed..length. Rows from
``stops[i]`` on keep their depth, so a staircase stays one.

Raises ValueError for a depth or a stop out of range, an unknown or repeated id, or lists of different
lengths. A call that raises changes nothing.)");
  pool.def("commit", &PagePool::Commit, py::arg("seqs"), py::arg("lengths"),
           R"(Commits the rows of ``seqs[i]`` below ``lengths[i]``; all rows beyond vanish, their pages too.

``lengths[i]`` is in committed..length, and every row below it has passed all ``num_layers`` layers.

Raises ValueError for a length out of range, a row not deep enough, an unknown or repeated id, or lists
of different lengths. A call that raises changes nothing.)");
  pool.def("truncate", &PagePool::Truncate, py::arg("seq"), py::arg("new_length"),
           R"(Cuts a sequence to ``new_length`` rows, committed ones too, and releases the pages beyond.

Raises ValueError unless 0 <= new_length <= length, and for an unknown id.)");
  pool.def("rollback", &PagePool::Rollback, py::arg("seq"),
           R"(Drops all pending rows and releases the pages beyond the committed ones.

Raises ValueError for an unknown id.)");
}

void BindReads(py::class_<PagePool>& pool) {
  pool.def_property_readonly("num_pages", &PagePool::num_pages, "Pages in the pool.");
  pool.def_property_readonly("page_size", &PagePool::page_size, "Positions per page.");
  pool.def_property_readonly("num_layers", &PagePool::num_layers, "Depth of a committed row.");
  pool.def_property_readonly("num_free", &PagePool::num_free, "Pages no sequence holds.");
  pool.def_property_readonly("num_sequences", &PagePool::num_sequences, "Sequences added and not freed.");
  pool.def("length", &PagePool::Length, py::arg("seq"),
           "Rows of a sequence, committed and pending. Raises ValueError for an unknown id.");
  pool.def("committed", &PagePool::Committed, py::arg("seq"),
           "Committed rows of a sequence. Raises ValueError for an unknown id.");
  pool.def("depths", &PagePool::Depths, py::arg("seq"),
           "Depth of each pending row, first to last: a list. Raises ValueError for an unknown id.");
  pool.def("pages", &PagePool::Pages, py::arg("seq"),
           "Page ids of a sequence in order of position: a list. Raises ValueError for an unknown id.");
  pool.def("ref_count", &PagePool::RefCount, py::arg("page"),
           "Table entries that name ``page``. Raises ValueError unless 0 <= page < num_pages.");
  pool.def("check_integrity", &PagePool::CheckIntegrity,
           R"(Proves that the books are in order: free + cached + owned == total, reference counts equal to
table entries, no page free and owned, tables in range and as long as the rows need, depths a staircase.

Raises RuntimeError naming what is broken.)");
}

void BindBatchReads(py::class_<PagePool>& pool) {
  pool.def(
      "lengths", [](const PagePool& pool, const std::vector<SequenceId>& seqs) { return ToNumpy(pool.Lengths(seqs)); },
      py::arg("seqs"), "Lengths, int64 [B]. Raises ValueError for an unknown id.");
  pool.def(
      "committed_lengths",
      [](const PagePool& pool, const std::vector<SequenceId>& seqs) { return ToNumpy(pool.CommittedLengths(seqs)); },
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
  BindCacheFull(m);
  py::class_<PagePool> pool(m, "PagePool",
                            R"(``num_pages`` pages of ``page_size`` positions, shared by sequences.

The first ``committed`` rows of a sequence have passed ``num_layers`` layers; the rows after them are
pending, each with a depth that never rises along the sequence (the staircase). Not thread-safe.)");
  pool.def(py::init<int64_t, int64_t, int64_t>(), py::arg("num_pages"), py::arg("page_size"), py::arg("num_layers"),
           R"(Raises ValueError unless each is at least 1 and num_pages * page_size fits in int32.)");
  pool.def("__repr__", &Repr);
  BindMoves(pool);
  BindReads(pool);
  BindBatchReads(pool);
}
