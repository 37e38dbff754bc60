// Threads of a parallel region that share work, and of which none waits for one that is not running.
//
// Work comes in phases, a phase in pieces. With a barrier between phases all cores would stand still
// for a thread that has lost its own to another process. Here whoever finds nothing left to begin
// does again what another has begun and should have ended: who is through first writes. So a piece
// computes into memory of its own thread and then takes the right to write, which one of all gets;
// what cannot be done twice is done behind that. A thread that comes back finds its phases over, and
// may have read what was no longer meant for it: it does not get the right any more.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include <omp.h>
#include <sched.h>

// What the threads know of each other. Numbers of phases only grow, so that nothing is ever reset.
class Crew {
public:
    // Room for phases of so many pieces; between regions.
    void prepare(int threads, int pieces) {
        if (threads > num_parts) parts.reset(new Part[num_parts = threads]);
        if (pieces + LINE * threads > num_states) {
            states.reset(new std::atomic<uint64_t>[num_states = pieces + LINE * threads]);
            for (int i = 0; i < num_states; ++i) states[i].store(0, std::memory_order_relaxed);
        }
    }

private:
    friend class Member;
    template <class Work> friend void together(int pieces, const Work& work);
    static constexpr int LINE = 8;      // states that lie together; no two parts share any
    struct alignas(64) Part { std::atomic<uint64_t> next{0}; };     // phase, and its next piece
    std::unique_ptr<Part[]> parts;
    std::unique_ptr<std::atomic<uint64_t>[]> states;    // twice the phase; 1 more when written
    std::atomic<int> through{0};    // threads at the end of their region
    int num_parts = 0, num_states = 0;
    uint64_t phase = 0, last = 0;
};

// The right to write a piece.
class Right {
public:
    Right(std::atomic<uint64_t>& state, uint64_t phase) : state(state), writing(2 * phase) {}
    ~Right() { if (taken) state.store(writing + 1, std::memory_order_release); }
    bool take() {
        uint64_t seen = state.load(std::memory_order_relaxed);
        return taken = seen < writing &&
                       state.compare_exchange_strong(seen, writing, std::memory_order_acq_rel);
    }

private:
    std::atomic<uint64_t>& state;
    const uint64_t writing;
    bool taken = false;
};

// One thread of a crew, on its own way through the phases: all go through the same ones.
class Member {
public:
    const int threads = omp_get_num_threads(), own = omp_get_thread_num();

    explicit Member(Crew& crew) : crew(crew), phase(crew.phase) {}

    // Where the thread's own share of so many begins; with 1 where it ends.
    int share(int all, int behind = 0) const { return (int64_t)all * (own + behind) / threads; }

    // One phase: each piece once by `piece(number, right)`, from there on by all.
    template <class Piece> void split(int pieces, const Piece& piece) {
        ++phase;
        patience = Clock::duration(LEAST);
        bool is_first = true;
        for (int i = 0; i < threads; ++i) {
            const int part = (own + i) % threads;
            for (int at; (at = claim(part, pieces)) != NONE;) {
                if (at == OVER) return;
                if (is_first) {
                    const auto began = Clock::now();
                    run(part, at, piece);
                    const Clock::duration took = 2 * (Clock::now() - began);
                    patience = std::min(std::max(took, patience), Clock::duration(MOST));
                    is_first = false;
                } else run(part, at, piece);
            }
        }
        for (int i = 1; i < threads; ++i) {
            const int part = (own + i) % threads;
            for (int at = begin_of(part, pieces); at < begin_of(part + 1, pieces); ++at)
                if (!is_written(part, at)) wait_for(part, at, piece);
        }
        for (int at = share(pieces); at < share(pieces, 1); ++at)
            if (!is_written(own, at)) wait_for(own, at, piece);
    }

    // The same of items so small that some are a piece; `item(number)` cannot be done twice.
    template <class Item> void split_items(int items, const Item& item) {
        const int pieces = std::min(items, 4 * threads);
        split(pieces, [&](int piece, Right& right) {
            if (!right.take()) return;
            const int end = (int64_t)items * (piece + 1) / pieces;
            for (int i = (int64_t)items * piece / pieces; i < end; ++i) item(i);
        });
    }

private:
    template <class Work> friend void together(int pieces, const Work& work);
    typedef std::chrono::steady_clock Clock;
    static constexpr std::chrono::microseconds LEAST{5}, MOST{100};
    static constexpr int NONE = -1, OVER = -2, PIECE_BITS = 24;
    Crew& crew;
    uint64_t phase;
    Clock::duration patience{};     // before another's piece is done again

    int begin_of(int part, int pieces) const { return (int64_t)pieces * part / threads; }

    // The next piece of a thread's part: NONE if all have begun, OVER if all is done.
    int claim(int part, int pieces) {
        std::atomic<uint64_t>& next = crew.parts[part].next;
        const int begin = begin_of(part, pieces), end = begin_of(part + 1, pieces);
        uint64_t seen = next.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t of = seen >> PIECE_BITS;
            if (of > phase) return OVER;
            const int at = of < phase ? begin : (int)(seen & ((1 << PIECE_BITS) - 1));
            if (at >= end) return NONE;
            if (next.compare_exchange_weak(seen, phase << PIECE_BITS | (at + 1),
                                           std::memory_order_acq_rel))
                return at;
        }
    }

    std::atomic<uint64_t>& state_of(int part, int at) const {
        return crew.states[at + Crew::LINE * part];
    }

    template <class Piece> void run(int part, int at, const Piece& piece) {
        Right right(state_of(part, at), phase);
        piece(at, right);
    }

    // The region's own barrier would burn what another needs to arrive there.
    void leave() {
        const auto until = Clock::now() + MOST;
        crew.through.fetch_add(1, std::memory_order_release);
        while (crew.through.load(std::memory_order_acquire) < threads) {
            pause();
            if (Clock::now() > until) sched_yield();
        }
    }

    static void pause() {
#ifdef __x86_64__
        for (int i = 0; i < 16; ++i) __builtin_ia32_pause();
#endif
    }

    bool is_written(int part, int at) const {
        return state_of(part, at).load(std::memory_order_acquire) > 2 * phase;
    }

    template <class Piece> void wait_for(int part, int at, const Piece& piece) {
        const auto until = Clock::now() + patience;
        while (!is_written(part, at)) {
            pause();
            if (Clock::now() < until) continue;
            if (state_of(part, at).load(std::memory_order_relaxed) < 2 * phase)
                run(part, at, piece);
            else sched_yield();     // it is being written
        }
    }
};

// A parallel region: `work(member)` in each thread, in phases of at most so many pieces.
template <class Work> void together(int pieces, const Work& work) {
    static thread_local Crew own;
    Crew& crew = own;       // inside the region each thread has another
    crew.prepare(omp_get_max_threads(), std::max(pieces, 4 * omp_get_max_threads()));
#pragma omp parallel
    {
        Member member(crew);
        work(member);
        if (member.own == 0) crew.last = member.phase;
        member.leave();
    }
    crew.phase = crew.last;
    crew.through.store(0, std::memory_order_relaxed);
}
