// Threads that take turns on one thread of the CPU, in an order that a seed decides, and what they wait for. A thread
// sanitizer sees each as a thread of its own, whose memory the others may touch only past a barrier that publishes.
#pragma once

#include <sanitizer/tsan_interface.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

// What switches is unknown to the sanitizer, which would see races in it.
#define UNWATCHED __attribute__((noinline, no_sanitize("thread")))

// It would wait for a second at the end for what other threads may still do.
extern "C" __attribute__((weak, used)) const char* __tsan_default_options() {
    return "atexit_sleep_ms=0:halt_on_error=1";
}

[[noreturn]] UNWATCHED inline void fail(const char* reason) {
    std::fprintf(stderr, "%s\n", reason);
    std::_Exit(3);
}

struct Fiber {
    int thread_idx, block_idx;
    void* sanitizer = nullptr;
    void* buffer[5] = {};  // of __builtin_setjmp
    ucontext_t context = {};
    bool has_begun = false;
    Fiber* next = nullptr;  // in a queue
};

struct FiberQueue {
    Fiber *first = nullptr, *last = nullptr;

    UNWATCHED void push(Fiber* fiber) {
        fiber->next = nullptr;
        if (first == nullptr) {
            first = fiber;
        } else {
            last->next = fiber;
        }
        last = fiber;
    }

    UNWATCHED void push_first(Fiber* fiber) {
        fiber->next = first;
        if (first == nullptr) last = fiber;
        first = fiber;
    }

    UNWATCHED Fiber* pop() {
        Fiber* fiber = first;
        if (fiber != nullptr) first = fiber->next;
        return fiber;
    }
};

struct Fibers {
    Fiber main, *current = &main;
    FiberQueue ready;
    std::vector<Fiber*> all;
    unsigned random = 1;  // the seed, and then what comes of it
    int favourite = -1;  // a block that goes first, if there is one
    int num_running = 0;
    void (*run)(void*) = nullptr;  // what each does, and what it is told
    void* told = nullptr;
    void (*when_switched)(const Fiber&) = nullptr;
    char begin = 0, end = 0;  // what they publish at, and main() does

    UNWATCHED void wake(Fiber* fiber) {
        random = random * 1664525u + 1013904223u;
        if (favourite < 0 ? random >> 31 : fiber->block_idx == favourite) {
            ready.push_first(fiber);
        } else {
            ready.push(fiber);
        }
    }

    // Until this one is woken.
    UNWATCHED void rest() {
        Fiber* next = ready.pop();
        if (next == nullptr) next = &main;
        if (next == current) return;
        switch_to(next);
    }

    UNWATCHED void switch_to(Fiber* next) {
        Fiber* own = current;
        current = next;
        if (next != &main) when_switched(*next);
        __tsan_switch_to_fiber(next->sanitizer, __tsan_switch_to_fiber_no_sync);
        if (__builtin_setjmp(own->buffer) == 0) jump_to(next);
    }

    UNWATCHED static void jump_to(Fiber* next) {
        if (next->has_begun) __builtin_longjmp(next->buffer, 1);
        next->has_begun = true;
        setcontext(&next->context);
    }

    static void live();

    UNWATCHED void add() {
        constexpr size_t kStackBytes = 1 << 18;
        Fiber* fiber = new Fiber;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = std::malloc(kStackBytes);
        fiber->context.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber->context, &Fibers::live, 0);
        fiber->sanitizer = __tsan_create_fiber(0);
        all.push_back(fiber);
    }

    // Runs what a thread does in `num_threads` fibers of each of `num_blocks`.
    UNWATCHED void run_all(int num_blocks, int num_threads, void (*what)(void*), void* with) {
        main.has_begun = true;
        main.sanitizer = __tsan_get_current_fiber();
        run = what;
        told = with;
        num_running = num_blocks * num_threads;
        favourite = num_blocks > 1 ? int(random % (num_blocks + 1)) - 1 : -1;
        while (int(all.size()) < num_running) add();
        for (int idx = 0; idx < num_running; ++idx) {
            all[idx]->thread_idx = idx % num_threads;
            all[idx]->block_idx = idx / num_threads;
            wake(all[idx]);
        }
        __tsan_release(&begin);
        rest();
        if (num_running > 0) fail("deadlock: threads wait for each other");
        __tsan_acquire(&end);
    }
};
inline Fibers fibers;

UNWATCHED inline void Fibers::live() {
    while (true) {
        __tsan_acquire(&fibers.begin);
        fibers.run(fibers.told);
        __tsan_release(&fibers.end);
        --fibers.num_running;
        fibers.rest();
    }
}

// Where `count` threads wait for each other.
struct FiberBarrier {
    int count = 0, num_arrived = 0;
    unsigned phase = 0;
    FiberQueue waiting;
    char published[2] = {};  // in turn, so that nobody sees what others do past the barrier

    UNWATCHED void arrive_and_wait(bool publishes = true) {
        char* const place = &published[phase % 2];
        if (publishes) __tsan_release(place);
        if (++num_arrived == count) {
            num_arrived = 0;
            ++phase;
            while (Fiber* fiber = waiting.pop()) fibers.wake(fiber);
        } else {
            waiting.push(fibers.current);
            fibers.rest();
        }
        if (publishes) __tsan_acquire(place);
    }
};
