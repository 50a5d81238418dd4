// How threads share work and what they fetch ahead, for the tests of both.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bindings/bindings.h"
#include "edgewise/ahead.h"
#include "edgewise/pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgewise {

namespace {

const uint8_t* pointer(size_t address) { return reinterpret_cast<const uint8_t*>(address); }

// (thread, from, to, own) of everything taken in `rounds` phases of one run.
std::vector<std::tuple<size_t, size_t, size_t, bool>> shares(size_t threads, size_t items, size_t least, size_t most, size_t rounds) {
  Pool pool(threads);
  std::vector<std::vector<std::tuple<size_t, size_t, size_t, bool>>> taken(threads);
  pool.run([&](size_t thread) {
    for (size_t round = 0; round < rounds; ++round) {
      pool.share(thread, items);
      for (Pool::Share share; pool.take_share(thread, least, most, share);)
        taken[thread].emplace_back(thread, share.from, share.to, share.own);
      pool.barrier();
    }
  });
  for (size_t thread = 1; thread < threads; ++thread) taken[0].insert(taken[0].end(), taken[thread].begin(), taken[thread].end());
  return taken[0];
}

}  // namespace

void bind_pool(nb::module_& m) {
  nb::class_<Governor>(m, "Governor", "How many threads a pool uses while others want the processor; see pool.h")
      .def(nb::init<size_t>(), "threads"_a)
      .def("observe", [](Governor& g, double seconds, long switches) {
             g.observe(std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9)), switches);
           }, "seconds"_a, "switches"_a)
      .def("pass_time", [](Governor& g, double seconds) { g.pass(std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9))); },
           "seconds"_a)
      .def_prop_ro("limit", &Governor::limit);

  m.def("pool_shares", &shares, "threads"_a, "items"_a, "least"_a, "most"_a, "rounds"_a, nb::call_guard<nb::gil_scoped_release>(),
        "(thread, from, to, own) of every share that the threads of a pool take; see pool.h");

  nb::class_<ReadAhead>(m, "ReadAhead", "What a thread reads next; see ahead.h. Addresses are plain numbers here")
      .def(nb::init<>())
      .def("reset", &ReadAhead::reset, "phases"_a)
      .def("clear", &ReadAhead::clear, "phase"_a)
      .def("add", [](ReadAhead& r, size_t phase, size_t address, size_t nbytes) { r.add(phase, pointer(address), nbytes); },
           "phase"_a, "address"_a, "nbytes"_a)
      .def("begin", &ReadAhead::begin)
      .def("seek", &ReadAhead::seek, "phase"_a)
      .def("over", [](ReadAhead& r, size_t address, size_t nbytes) {  // where the fetching begins, turns, and goes on
             const Ahead a = r.over(pointer(address), nbytes);
             return std::tuple(a.before, reinterpret_cast<size_t>(a.turn), a.after);
           }, "address"_a, "nbytes"_a, "(before, turn, after) for reading nbytes at that address")
      .def("fetch", &ReadAhead::fetch, "nbytes"_a)
      .def_prop_ro("lead", &ReadAhead::lead);
}

}  // namespace edgewise
