// How the page pool says what went wrong: one line each, built from its parts.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace layerskip {

template <typename... Parts>
std::string Concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// The caller's mistake.
template <typename... Parts>
void Require(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(Concat(parts...));
}

// Our own mistake.
template <typename... Parts>
void Ensure(bool ok, const Parts&... parts) {
  if (!ok) throw std::logic_error(Concat("page pool broken: ", parts...));
}

// Pages ran short: `needed` for the whole call, `free` when it was made (cached ones included).
class CacheFull : public std::runtime_error {
 public:
  CacheFull(int64_t needed, int64_t free)
      : std::runtime_error(Concat("the cache is full: ", needed, " pages needed, ", free,
                                  " free; free or truncate sequences, or build the cache with more pages")),
        needed(needed),
        free(free) {}
  int64_t needed;
  int64_t free;
};

}  // namespace layerskip
