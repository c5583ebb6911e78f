// A mutex that a forked child finds free, and what it guards whole: a fork waits until no thread holds any of them.
//
// With a std::mutex, a child forked while another thread holds it waits for a thread that it does not have. Locked for
// moments only: a fork waits for the holders, so none may wait for a fork, or for Python. Torch-free.
#pragma once

#include <pthread.h>

#include <mutex>
#include <unordered_set>

namespace layerskip {

class ForkSafeMutex {
 public:
  ForkSafeMutex() {
    const std::lock_guard<std::mutex> lock(All().mutex);
    All().members.insert(this);
  }
  ~ForkSafeMutex() {
    const std::lock_guard<std::mutex> lock(All().mutex);
    All().members.erase(this);
  }
  ForkSafeMutex(const ForkSafeMutex&) = delete;
  ForkSafeMutex& operator=(const ForkSafeMutex&) = delete;

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Registry {
    std::mutex mutex;  // taken before any member's
    std::unordered_set<ForkSafeMutex*> members;
  };

  static Registry& All() {
    static Registry* const all = [] {
      pthread_atfork(BeforeFork, AfterFork, AfterFork);
      return new Registry;  // outlives all users
    }();
    return *all;
  }

  static void BeforeFork() {
    All().mutex.lock();
    for (ForkSafeMutex* member : All().members) member->lock();
  }

  static void AfterFork() {
    for (ForkSafeMutex* member : All().members) member->unlock();
    All().mutex.unlock();
  }

  std::mutex mutex_;
};

using ForkSafeLock = std::lock_guard<ForkSafeMutex>;

}  // namespace layerskip
