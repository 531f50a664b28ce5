// One streaming multiprocessor on the CPU: runs the PTX of a kernel, one program after another, a warp at a time.
//
// emulator.py translates PTX to an array of Instruction; the operations below are found by their PTX names. A register
// holds 64 bits for each of 32 lanes, and beside them one bit per lane that says whether the value is undefined. Shadow
// memory knows for every granule of memory who wrote and who read it last, which is what hazards are found from: by the
// order that synchronisation guarantees, not by the order in which warps happen to run.

#include <algorithm>
#include <climits>
#include <vector>

#include "operations.h"

constexpr int LANES = 32;
constexpr u64 SHARED_BASE = 0x1000;  // of the shared window: an address computed from 0 is not in it

struct Instruction {  // 40 x int32, as emulator.py lays it out
  s32 op, pred, negated, target, ndst, nsrc, bytes, flags;
  s32 dst[8], src[16], pad[8];
};
enum Flag { GLOBAL = 1, SHARED = 2, SIGNED = 4, READ_ONLY = 8, TRANSPOSED = 16 };

struct Buffer {
  u64 base, size, granule;
  u8* state;  // of every byte
};
enum ByteState { UNDEFINED = 1, FENCED = 2 };

enum Kind {
  OUT_OF_BOUNDS,
  MISALIGNED,
  FENCED_ACCESS,
  RACE_WARPS,
  RACE_PROGRAMS,
  RACE_LANES_UNORDERED,
  RACE_LANES_CONVERGED,
  SAME_VALUE,
  LANES_DISAGREE,
  UNDEFINED_ADDRESS,
  UNDEFINED_PREDICATE,
  UNDEFINED_BRANCH,
  DIVERGED_BARRIER,
  DIFFERENT_BARRIERS,
  BARRIER_AFTER_EXIT,
  DEADLOCK,
  NEVER_ENDS,
  SHUFFLE_OF_INACTIVE,
  STALE_READ_ONLY,
  FAULT_KINDS
};
struct Fault {
  s64 kind, pc, other_pc, program, thread, other_program, other_thread;
  u64 address, count;
};

struct Launch {
  const Instruction* code;
  s64 num_instructions, num_registers;
  const s32* constant_register;
  const u64* constant_value;
  s64 num_constants;
  s32 special[16];  // registers of tid.x, ctaid.xyz, nctaid.xyz, ntid.x, laneid, or -1
  s64 grid[3];
  s64 num_warps, shared_size;
  const Buffer* buffers;
  s64 num_buffers;
  u64 seed;
  s64 noise, limit;
  Fault* faults;
  s64 max_faults, num_faults;
  u64 instructions;  // executed by warps
};

// --------------------------------------------------------------------------------------------------------- the machine

struct Shadow {  // of one granule: who wrote it last, who read it last
  s32 write_program = -1, write_pc, read_program = -1, read_pc;
  u32 write_epoch, write_hard, write_soft, read_epoch, read_hard, read_soft;
  s16 write_thread, read_thread;
  bool read_by_lanes, read_by_warps, read_by_programs;  // more than one since the last write or barrier
};

struct Warp {
  std::vector<u64> registers;
  std::vector<u32> undefined, high;  // high: of the upper 32 bits
  u32 u(s32 k) const { return undefined[k] | high[k]; }
  s32 pcs[LANES];
  s32 pc;
  u32 mask, alive, blocked;
  s32 others;      // others: the lowest pc of lanes outside of mask
  u32 hard, soft;  // synchronisations of this warp so far
  bool at_barrier;
  int number;
  u64* r(s32 k) { return &registers[size_t(k) * LANES]; }
};

struct Machine {
  Launch& L;
  std::vector<Warp> warps;
  std::vector<std::vector<Shadow>> shadow;  // of buffers
  std::vector<Shadow> shared_shadow;
  std::vector<u8> shared, shared_state;
  s32 program = 0;
  u32 epoch = 0;
  s64 left;
  bool dead = false;
  int last_buffer = 0;
  u64 state;

  explicit Machine(Launch& launch)
      : L(launch), warps(launch.num_warps), left(launch.limit), state(launch.seed * 2 + 1) {
    for (int k = 0; k < L.num_buffers; k++) shadow.emplace_back(L.buffers[k].size / L.buffers[k].granule + 1);
    shared.resize(L.shared_size + 16);
    shared_state.resize(L.shared_size);
    shared_shadow.resize(L.shared_size);
    for (int w = 0; w < L.num_warps; w++) {
      Warp& warp = warps[w];
      warp.number = w;
      warp.registers.resize(L.num_registers * LANES);
      warp.undefined.resize(L.num_registers);
      warp.high.resize(L.num_registers);
      for (int k = 0; k < L.num_constants; k++) fill(warp, L.constant_register[k], L.constant_value[k]);
      for (int l = 0; l < LANES; l++) {
        if (L.special[0] >= 0) warp.r(L.special[0])[l] = w * LANES + l;
        if (L.special[8] >= 0) warp.r(L.special[8])[l] = l;
      }
      for (int k = 0; k < 3; k++) fill(warp, L.special[4 + k], L.grid[k]);
      fill(warp, L.special[7], L.num_warps * LANES);
    }
  }
  void fill(Warp& w, s32 k, u64 x) {
    if (k >= 0) std::fill_n(w.r(k), LANES, x);
  }
  u64 random() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }

  void fault(Kind kind, s32 pc, s32 thread, s32 other_pc = -1, s32 other_program = -1, s32 other_thread = -1,
             u64 address = 0) {
    for (s64 k = 0; k < L.num_faults; k++) {
      Fault& f = L.faults[k];
      if (f.kind == kind && f.pc == pc && f.other_pc == other_pc) {
        f.count++;
        return;
      }
    }
    if (L.num_faults < L.max_faults)
      L.faults[L.num_faults++] = {kind, pc, other_pc, program, thread, other_program, other_thread, address, 1};
  }

  // ------------------------------------------------------------------------------------------------------------ memory

  void check(Shadow& s, Warp& w, int lane, s32 pc, bool write, bool agrees, u64 address) {
    s32 thread = w.number * LANES + lane;
    auto order = [&](s32 other_program, s32 other_thread, s32 other_pc, u32 other_epoch, u32 hard, u32 soft,
                     bool several_lanes, bool several_warps, bool several_programs, bool agrees) {
      if (other_program < 0) return;
      if (other_program != program || several_programs) {
        fault(agrees ? SAME_VALUE : RACE_PROGRAMS, pc, thread, other_pc, other_program, other_thread, address);
        return;
      }
      if (other_epoch != epoch) return;
      if (other_thread / LANES != w.number || several_warps) {
        fault(agrees ? SAME_VALUE : RACE_WARPS, pc, thread, other_pc, other_program, other_thread, address);
        return;
      }
      if ((other_thread == thread && !several_lanes) || hard != w.hard) return;
      bool one = other_pc == pc && soft == w.soft;  // one store, or nothing between two turns of a loop
      if (one && agrees) return;
      Kind kind = one ? LANES_DISAGREE : soft == w.soft ? RACE_LANES_UNORDERED : RACE_LANES_CONVERGED;
      fault(kind, pc, thread, other_pc, other_program, other_thread, address);
    };
    order(s.write_program, s.write_thread, s.write_pc, s.write_epoch, s.write_hard, s.write_soft, false, false, false,
          agrees);
    if (write) {
      order(s.read_program, s.read_thread, s.read_pc, s.read_epoch, s.read_hard, s.read_soft, s.read_by_lanes,
            s.read_by_warps, s.read_by_programs, false);
      s.write_program = program;
      s.write_thread = thread;
      s.write_pc = pc;
      s.write_epoch = epoch;
      s.write_hard = w.hard;
      s.write_soft = w.soft;
      s.read_program = -1;
      s.read_by_lanes = s.read_by_warps = s.read_by_programs = false;
    } else {
      bool same = s.read_program == program;
      s.read_by_programs = s.read_by_programs || (s.read_program >= 0 && !same);
      same = same && s.read_epoch == epoch;
      s.read_by_warps = same && (s.read_by_warps || s.read_thread / LANES != w.number);
      s.read_by_lanes = same && s.read_hard == w.hard && (s.read_by_lanes || s.read_thread != thread);
      s.read_program = program;
      s.read_thread = thread;
      s.read_pc = pc;
      s.read_epoch = epoch;
      s.read_hard = w.hard;
      s.read_soft = w.soft;
    }
  }

  void access(Warp& w, const Instruction& i, u32 mask) {
    bool write = i.op == OP_st, global = i.flags & GLOBAL;
    int values = write ? i.nsrc - 2 : i.ndst, size = i.bytes * values;
    const u64 *base = w.r(i.src[0]), *offset = w.r(i.src[1]);
    u32 undefined = w.u(i.src[0]) & mask;
    s32 pc = &i - L.code;
    if (undefined) fault(UNDEFINED_ADDRESS, pc, w.number * LANES + __builtin_ctz(undefined));
    for (int l = 0; l < LANES; l++) {
      if (!(mask >> l & 1)) continue;
      u64 address = global ? base[l] + offset[l] : u32(base[l] + offset[l]);
      s32 thread = w.number * LANES + l;
      if (address % size) fault(MISALIGNED, pc, thread, -1, -1, -1, address);
      u8 *memory = nullptr, *bytes = nullptr;
      Shadow* shadows = nullptr;
      u64 granule = 1;
      if (global) {
        for (int k = 0; k < L.num_buffers; k++) {
          int at = (last_buffer + k) % L.num_buffers;
          const Buffer& b = L.buffers[at];
          if (address - b.base < b.size && address - b.base + size <= b.size) {
            u64 from = address - b.base;
            memory = (u8*)address;
            bytes = b.state + from;
            granule = b.granule;
            shadows = &shadow[at][from / granule];
            last_buffer = at;
            break;
          }
        }
      } else if (address >= SHARED_BASE && address - SHARED_BASE + size <= u64(L.shared_size)) {
        u64 from = address - SHARED_BASE;
        memory = &shared[from];
        bytes = &shared_state[from];
        shadows = &shared_shadow[from];
      }
      if (!memory) {
        fault(OUT_OF_BOUNDS, pc, thread, -1, -1, -1, address);
        if (!write)
          for (int v = 0; v < values; v++) w.undefined[i.dst[v]] |= 1u << l;
        continue;
      }
      bool agrees = false;
      if (write) {
        agrees = true;
        for (int v = 0; v < values; v++)
          agrees = agrees && !memcmp(memory + v * i.bytes, &w.r(i.src[2 + v])[l], i.bytes);
      }
      for (u64 at = 0; at < u64(size); at += granule) {
        if ((i.flags & READ_ONLY) && shadows[at / granule].write_program >= 0)
          fault(STALE_READ_ONLY, pc, thread, shadows[at / granule].write_pc);
        check(shadows[at / granule], w, l, pc, write, agrees, address + at);
      }
      for (int v = 0; v < values; v++) {
        u8 *here = memory + v * i.bytes, *known = bytes + v * i.bytes;
        u8 halves[2] = {0, 0};
        for (int at = 0; at < i.bytes; at++) halves[at / 4] |= known[at];
        if (i.bytes < 8) halves[1] = halves[0];
        u8 seen = halves[0] | halves[1];
        if (seen & FENCED) fault(FENCED_ACCESS, pc, thread, -1, -1, -1, address + v * i.bytes);
        if (write) {
          memcpy(here, &w.r(i.src[2 + v])[l], i.bytes);
          u8 now[2] = {u8(w.undefined[i.src[2 + v]] >> l & 1),
                       u8((i.bytes == 8 ? w.high : w.undefined)[i.src[2 + v]] >> l & 1)};
          for (int at = 0; at < i.bytes; at++) known[at] = (known[at] & ~UNDEFINED) | now[at / 4];
        } else {
          u64 x = 0;
          memcpy(&x, here, i.bytes);
          if (i.flags & SIGNED) x = i.bytes == 1 ? u64(s64(s8(x))) : i.bytes == 2 ? u64(s64(s16(x))) : u64(s64(s32(x)));
          w.r(i.dst[v])[l] = x;
          put(w, i.dst[v], 1u << l, u32(halves[0] & UNDEFINED) << l, u32(halves[1] & UNDEFINED) << l);
        }
      }
    }
  }

  // ldmatrix and stmatrix: 8 x 8 matrices of 2-byte elements, rows of 16 bytes whose addresses 8 lanes each give; a
  // lane holds two neighbours of a row, or of a column if transposed.
  void matrices(Warp& w, const Instruction& i) {
    bool write = i.op == OP_stmatrix, transposed = i.flags & TRANSPOSED;
    int n = write ? i.nsrc - 2 : i.ndst;
    const u64 *base = w.r(i.src[0]), *offset = w.r(i.src[1]);
    s32 pc = &i - L.code;
    for (int k = 0; k < n; k++) {
      u8* rows[8] = {};
      u8* states[8] = {};
      s32 to = write ? i.src[2 + k] : i.dst[k];
      for (int row = 0; row < 8; row++) {
        int lane = k * 8 + row;
        u64 address = u32(base[lane] + offset[lane]), from = address - SHARED_BASE;
        s32 thread = w.number * LANES + lane;
        if (w.u(i.src[0]) >> lane & 1) fault(UNDEFINED_ADDRESS, pc, thread);
        if (address % 16) fault(MISALIGNED, pc, thread, -1, -1, -1, address);
        if (address < SHARED_BASE || from + 16 > u64(L.shared_size)) {
          fault(OUT_OF_BOUNDS, pc, thread, -1, -1, -1, address);
          dead = true;
          return;
        }
        rows[row] = &shared[from];
        states[row] = &shared_state[from];
        for (int at = 0; at < 16; at++) check(shared_shadow[from + at], w, lane, pc, write, false, address + at);
      }
      for (int l = 0; l < LANES; l++)
        for (int half = 0; half < 2; half++) {
          int row = l / 4, column = l % 4 * 2 + half;
          if (transposed) std::swap(row, column);
          u8 *memory = rows[row] + column * 2, *state = states[row] + column * 2;
          u64& x = w.r(to)[l];
          u32& u = w.undefined[to];
          if (write) {
            memory[0] = x >> 16 * half;
            memory[1] = x >> (16 * half + 8);
            state[0] = state[1] = u >> l & 1;
          } else {
            x = (half ? x & 0xffff : 0) | u64(memory[0] | memory[1] << 8) << 16 * half;
            u = (half ? u : u & ~(1u << l)) | u32((state[0] | state[1]) & UNDEFINED) << l;
          }
        }
    }
    for (int k = 0; !write && k < n; k++) w.high[i.dst[k]] = w.undefined[i.dst[k]];
    w.soft++;
  }

  // ----------------------------------------------------------------------------------------------------------- control

  void regroup(Warp& w) {  // the lanes at the lowest pc run next
    s32 lowest = INT_MAX;
    for (int l = 0; l < LANES; l++)
      if ((w.alive & ~w.blocked) >> l & 1) lowest = std::min(lowest, w.pcs[l]);
    w.mask = 0;
    w.others = INT_MAX;
    w.pc = lowest;
    for (int l = 0; l < LANES; l++) {
      if (!((w.alive & ~w.blocked) >> l & 1)) continue;
      if (w.pcs[l] == lowest)
        w.mask |= 1u << l;
      else
        w.others = std::min(w.others, w.pcs[l]);
    }
  }
  void leave(Warp& w, s32 pc) {
    for (int l = 0; l < LANES; l++)
      if (w.mask >> l & 1) w.pcs[l] = pc;
  }
  void go(Warp& w, s32 pc) {
    w.pc = pc;
    if (pc >= w.others) {
      leave(w, pc);
      regroup(w);
    }
  }
  // Whether all lanes that a warp-wide instruction needs are here; if not, those that are wait.
  bool together(Warp& w, u32 needed) {
    needed &= w.alive;
    if (w.mask == needed) return true;
    leave(w, w.pc);
    u32 here = w.mask;
    for (int l = 0; l < LANES; l++)
      if ((w.blocked >> l & 1) && w.pcs[l] == w.pc) here |= 1u << l;
    if (here == needed) {
      w.blocked &= ~here;
      w.mask = here;
      return true;
    }
    w.blocked |= w.mask;
    s32 pc = w.pc;
    regroup(w);
    if (!w.mask) {
      fault(DEADLOCK, pc, w.number * LANES + __builtin_ctz(here));
      dead = true;
    }
    return false;
  }
  void release(Warp& w) {  // lanes that waited for lanes which have ended
    if (w.mask || !w.alive) return;
    w.blocked = 0;
    regroup(w);
  }

  template <class A, class R, class F>
  void map1(Warp& w, const Instruction& i, u32 m, F f) {
    const u64* a = w.r(i.src[0]);
    u64* d = w.r(i.dst[0]);
    if (m == ~0u)
      for (int l = 0; l < LANES; l++) d[l] = bits<R>(R(f(as<A>(a[l]))));
    else
      for (int l = 0; l < LANES; l++)
        if (m >> l & 1) d[l] = bits<R>(R(f(as<A>(a[l]))));
    taint(w, i, m, w.u(i.src[0]));
  }
  template <class A, class B, class R, class F>
  void map2(Warp& w, const Instruction& i, u32 m, F f) {
    const u64 *a = w.r(i.src[0]), *b = w.r(i.src[1]);
    u64* d = w.r(i.dst[0]);
    if (m == ~0u)
      for (int l = 0; l < LANES; l++) d[l] = bits<R>(R(f(as<A>(a[l]), as<B>(b[l]))));
    else
      for (int l = 0; l < LANES; l++)
        if (m >> l & 1) d[l] = bits<R>(R(f(as<A>(a[l]), as<B>(b[l]))));
    taint(w, i, m, w.u(i.src[0]) | w.u(i.src[1]));
  }
  template <class A, class B, class C, class R, class F>
  void map3(Warp& w, const Instruction& i, u32 m, F f) {
    const u64 *a = w.r(i.src[0]), *b = w.r(i.src[1]), *c = w.r(i.src[2]);
    u64* d = w.r(i.dst[0]);
    if (m == ~0u)
      for (int l = 0; l < LANES; l++) d[l] = bits<R>(R(f(as<A>(a[l]), as<B>(b[l]), as<C>(c[l]))));
    else
      for (int l = 0; l < LANES; l++)
        if (m >> l & 1) d[l] = bits<R>(R(f(as<A>(a[l]), as<B>(b[l]), as<C>(c[l]))));
    taint(w, i, m, w.u(i.src[0]) | w.u(i.src[1]) | w.u(i.src[2]));
  }
  template <class T, class F, class G, class H>
  void bitwise(Warp& w, const Instruction& i, u32 m, F f, G settles_a, H settles_b) {
    const u64 *a = w.r(i.src[0]), *b = w.r(i.src[1]);
    u64* d = w.r(i.dst[0]);
    u32 ua = w.u(i.src[0]), ub = w.u(i.src[1]), u = ua | ub;
    for (int l = 0; u && l < LANES; l++) {
      if ((u >> l & 1) && ((!(ua >> l & 1) && settles_a(as<T>(a[l]))) || (!(ub >> l & 1) && settles_b(as<T>(b[l])))))
        u &= ~(1u << l);
    }
    for (int l = 0; l < LANES; l++)
      if (m >> l & 1) d[l] = bits<T>(f(as<T>(a[l]), as<T>(b[l])));
    taint(w, i, m, u);
  }
  void put(Warp& w, s32 k, u32 m, u32 low, u32 high) {
    w.undefined[k] = (w.undefined[k] & ~m) | (low & m);
    w.high[k] = (w.high[k] & ~m) | (high & m);
  }
  void taint(Warp& w, const Instruction& i, u32 m, u32 u) {
    for (int k = 0; k < i.ndst; k++) put(w, i.dst[k], m, u, u);
  }
  template <class T, class F>
  void pair(Warp& w, const Instruction& i, u32 m, F f) {
    for (int l = 0; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      T a = as<T>(w.r(i.src[0])[l]), b = as<T>(w.r(i.src[1])[l]);
      bool lo = f(wide(a.lo), wide(b.lo)), hi = f(wide(a.hi), wide(b.hi));
      w.r(i.dst[0])[l] = lo;
      w.r(i.dst[1])[l] = hi;
    }
    taint(w, i, m, w.u(i.src[0]) | w.u(i.src[1]));
  }
  template <class T, class F>
  void reduce(Warp& w, const Instruction& i, u32 m, F f) {
    const u64* a = w.r(i.src[0]);
    int first = __builtin_ctz(m);
    T x = as<T>(a[first]);
    for (int l = first + 1; l < LANES; l++)
      if (m >> l & 1) x = f(x, as<T>(a[l]));
    for (int l = 0; l < LANES; l++)
      if (m >> l & 1) w.r(i.dst[0])[l] = bits<T>(x);
    taint(w, i, m, w.u(i.src[0]) & m ? ~0u : 0);
    w.soft++;
  }
  void shuffle(Warp& w, const Instruction& i, u32 m) {
    const u64 *a = w.r(i.src[0]), *b = w.r(i.src[1]), *c = w.r(i.src[2]);
    u64 result[LANES], inside[LANES];
    u32 undefined = 0;
    for (int l = 0; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      int n = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31, lowest = l & segment,
          highest = (l & segment) | (clamp & ~segment), from;
      bool valid;
      switch (i.op) {
        case OP_shfl_up:
          from = l - n;
          valid = from >= highest;
          break;
        case OP_shfl_down:
          from = l + n;
          valid = from <= highest;
          break;
        case OP_shfl_bfly:
          from = l ^ n;
          valid = from <= highest;
          break;
        default: from = lowest | (n & ~segment); valid = from <= highest;
      }
      if (!valid) from = l;
      if (!(m >> from & 1)) {
        fault(SHUFFLE_OF_INACTIVE, &i - L.code, w.number * LANES + l);
        undefined |= 1u << l;
      }
      result[l] = u32(a[from]);
      inside[l] = valid;
      undefined |= u32(w.u(i.src[0]) >> from & 1) << l;
    }
    undefined |= w.u(i.src[1]) | w.u(i.src[2]);
    for (int l = 0; l < LANES; l++)
      if (m >> l & 1) {
        w.r(i.dst[0])[l] = result[l];
        if (i.ndst > 1) w.r(i.dst[1])[l] = inside[l];
      }
    taint(w, i, m, undefined);
    w.soft++;
  }

  // Runs a warp until it waits at a barrier, has ended or has had its turn.
  void run(Warp& w, int turn) {
    while (turn-- > 0 && !w.at_barrier && w.alive && !dead) {
      if (--left < 0) {
        fault(NEVER_ENDS, w.pc, w.number * LANES);
        dead = true;
        return;
      }
      s32 pc = w.pc;
      const Instruction& i = L.code[pc];
      u32 m = w.mask;
      u32 holds = m;
      if (i.pred >= 0) {
        const u64* p = w.r(i.pred);
        holds = 0;
        for (int l = 0; l < LANES; l++) holds |= u32((p[l] & 1) != u64(i.negated)) << l;
        holds &= m;
        u32 u = w.u(i.pred) & m;
        if (u && i.op == OP_bra)
          fault(UNDEFINED_BRANCH, pc, w.number * LANES + __builtin_ctz(u));
        else if (u && (i.op == OP_ld || i.op == OP_st))
          fault(UNDEFINED_PREDICATE, pc, w.number * LANES + __builtin_ctz(u));
      }
      switch (i.op) {  // what moves or gathers lanes
        case OP_bra:
          L.instructions++;
          if (holds == m)
            go(w, i.target);
          else if (!holds)
            go(w, pc + 1);
          else {
            for (int l = 0; l < LANES; l++)
              if (m >> l & 1) w.pcs[l] = holds >> l & 1 ? i.target : pc + 1;
            regroup(w);
          }
          continue;
        case OP_ret:
          L.instructions++;
          w.alive &= ~holds;
          w.mask &= ~holds;
          if (w.mask) {
            go(w, pc + 1);
          } else {
            regroup(w);
            release(w);
          }
          continue;
        case OP_trap:
          fault(NEVER_ENDS, pc, w.number * LANES);
          dead = true;
          return;
        case OP_bar_sync:
          if (m != w.alive) fault(DIVERGED_BARRIER, pc, w.number * LANES + __builtin_ctz(m));
          if (!together(w, ~0u)) continue;
          L.instructions++;
          w.at_barrier = true;
          continue;
        case OP_ldmatrix:
        case OP_stmatrix:
          if (!together(w, ~0u)) continue;
          m = holds = w.mask;
          break;
        case OP_bar_warp_sync:
        case OP_shfl_bfly:
        case OP_shfl_up:
        case OP_shfl_down:
        case OP_shfl_idx:
        case OP_vote_ballot:
        case OP_vote_any:
        case OP_vote_all:
        case OP_redux_add:
        case OP_redux_min_s32:
        case OP_redux_max_s32:
        case OP_redux_min_u32:
        case OP_redux_max_u32:
        case OP_redux_and:
        case OP_redux_or:
        case OP_redux_xor:
        case OP_redux_min_f32:
        case OP_redux_max_f32:
        case OP_redux_min_NaN_f32:
        case OP_redux_max_NaN_f32:
          if (i.pred >= 0) {
            fault(DEADLOCK, pc, w.number * LANES);
            dead = true;
            return;
          }
          if (!together(w, u32(w.r(i.src[i.nsrc - 1])[__builtin_ctz(m)]))) continue;
          m = holds = w.mask;
          break;
      }
      L.instructions++;
      if (holds) execute(w, i, holds);
      if (i.pred >= 0 && i.op != OP_st) taint_by_predicate(w, i, m);
      go(w, pc + 1);
    }
  }
  void taint_by_predicate(Warp& w, const Instruction& i, u32 m) {
    u32 u = w.u(i.pred) & m;
    if (u)
      for (int k = 0; k < i.ndst; k++) w.undefined[i.dst[k]] |= u;
  }
  void execute(Warp& w, const Instruction& i, u32 m) {
    u32 low = 0, high = 0;  // of what is known by halves of 64 bits
    bool pairs = i.op == OP_mov_b64 || i.op == OP_fma_rn_f32x2 || (i.op >= OP_add_rn_f32x2 && i.op <= OP_sub_f32x2);
    bool truncates = i.op == OP_cvt_u32_u64 || i.op == OP_cvt_s32_s64 || i.op == OP_cvt_u16_u64;
    if (pairs || truncates)
      for (int k = 0; k < i.nsrc; k++) {
        low |= w.undefined[i.src[k]];
        high |= w.high[i.src[k]];
      }
    switch (i.op) {
#define O(name, R, A, expression) \
  case OP_##name: map1<A, R>(w, i, m, [](A a) { return expression; }); break;
      UNARY(O)
#undef O
#define O(name, R, A, B, expression) \
  case OP_##name: map2<A, B, R>(w, i, m, [](A a, B b) { return expression; }); break;
      BINARY(O)
#undef O
#define O(name, T, expression, settles_a, settles_b)                                      \
  case OP_##name:                                                                         \
    bitwise<T>(                                                                           \
        w, i, m, [](T a, T b) -> T { return expression; }, [](T a) { return settles_a; }, \
        [](T b) { return settles_b; });                                                   \
    break;
      BITWISE(O)
#undef O
#define O(name, R, A, B, C, expression) \
  case OP_##name: map3<A, B, C, R>(w, i, m, [](A a, B b, C c) { return expression; }); break;
      TERNARY(O)
#undef O
#define O(name, expression)                                                                       \
  case OP_##name: {                                                                               \
    const u64 *pa = w.r(i.src[0]), *pb = w.r(i.src[1]), *pc = w.r(i.src[2]), *pd = w.r(i.src[3]); \
    u64* to = w.r(i.dst[0]);                                                                      \
    for (int l = 0; l < LANES; l++)                                                               \
      if (m >> l & 1) {                                                                           \
        u32 a = pa[l], b = pb[l], c = pc[l], d = pd[l];                                           \
        to[l] = expression;                                                                       \
      }                                                                                           \
    taint(w, i, m, w.u(i.src[0]) | w.u(i.src[1]) | w.u(i.src[2]) | w.u(i.src[3]));                \
    break;                                                                                        \
  }
      QUATERNARY(O)
#undef O
#define O(name) case OP_##name:
      SELECTS(O) {
        const u64 *a = w.r(i.src[0]), *b = w.r(i.src[1]), *p = w.r(i.src[2]);
        u64* d = w.r(i.dst[0]);
        u32 first = 0;
        for (int l = 0; l < LANES; l++) first |= u32(p[l] & 1) << l;
        u32 low = (w.undefined[i.src[0]] & first) | (w.undefined[i.src[1]] & ~first) | w.u(i.src[2]);
        u32 high = (w.high[i.src[0]] & first) | (w.high[i.src[1]] & ~first) | w.u(i.src[2]);
        for (int l = 0; l < LANES; l++)
          if (m >> l & 1) d[l] = first >> l & 1 ? a[l] : b[l];
        put(w, i.dst[0], m, low, high);
        break;
      }
#undef O
#define O(name, T, expression) \
  case OP_##name: pair<T>(w, i, m, [](f32 a, f32 b) { return expression; }); break;
      PAIRS(O)
#undef O
      case OP_pack_2:
      case OP_pack_4: {  // bytes: of a part
        u32 u = 0;
        u64 result[LANES];
        for (int k = 0; k < i.nsrc; k++) u |= w.u(i.src[k]);
        u64 part = i.bytes == 8 ? ~0ull : (1ull << i.bytes * 8) - 1;
        for (int l = 0; l < LANES; l++) {
          result[l] = 0;
          for (int k = 0; k < i.nsrc; k++) result[l] |= (w.r(i.src[k])[l] & part) << 8 * i.bytes * k;
        }
        for (int l = 0; l < LANES; l++)
          if (m >> l & 1) w.r(i.dst[0])[l] = result[l];
        if (i.bytes == 4)
          put(w, i.dst[0], m, w.u(i.src[0]), w.u(i.src[1]));
        else
          taint(w, i, m, u);
        break;
      }
      case OP_unpack_2:
      case OP_unpack_4: {
        u64 part = (1ull << i.bytes * 8) - 1, from[LANES];
        u32 u = w.u(i.src[0]), low = w.undefined[i.src[0]], high = w.high[i.src[0]];
        memcpy(from, w.r(i.src[0]), sizeof from);
        for (int k = 0; k < i.ndst; k++)
          for (int l = 0; l < LANES; l++)
            if (m >> l & 1) w.r(i.dst[k])[l] = from[l] >> 8 * i.bytes * k & part;
        taint(w, i, m, u);
        if (i.bytes == 4) {
          put(w, i.dst[1], m, high, high);
          put(w, i.dst[0], m, low, low);
        }
        break;
      }
      case OP_ld:
      case OP_st: access(w, i, m); break;
      case OP_ldmatrix:
      case OP_stmatrix: matrices(w, i); break;
      case OP_bar_warp_sync:
        w.hard++;
        w.soft++;
        break;
      case OP_shfl_bfly:
      case OP_shfl_up:
      case OP_shfl_down:
      case OP_shfl_idx: shuffle(w, i, m); break;
      case OP_vote_ballot:
      case OP_vote_any:
      case OP_vote_all: {
        u32 ballot = 0, u = w.u(i.src[0]) & m ? ~0u : 0;
        for (int l = 0; l < LANES; l++) ballot |= u32(w.r(i.src[0])[l] & 1) << l;
        ballot &= m;
        u64 x = i.op == OP_vote_ballot ? ballot : i.op == OP_vote_any ? ballot != 0 : ballot == m;
        for (int l = 0; l < LANES; l++)
          if (m >> l & 1) w.r(i.dst[0])[l] = x;
        taint(w, i, m, u);
        w.soft++;
        break;
      }
      case OP_redux_add: reduce<u32>(w, i, m, [](u32 a, u32 b) { return a + b; }); break;
      case OP_redux_min_s32: reduce<s32>(w, i, m, [](s32 a, s32 b) { return std::min(a, b); }); break;
      case OP_redux_max_s32: reduce<s32>(w, i, m, [](s32 a, s32 b) { return std::max(a, b); }); break;
      case OP_redux_min_u32: reduce<u32>(w, i, m, [](u32 a, u32 b) { return std::min(a, b); }); break;
      case OP_redux_max_u32: reduce<u32>(w, i, m, [](u32 a, u32 b) { return std::max(a, b); }); break;
      case OP_redux_and: reduce<u32>(w, i, m, [](u32 a, u32 b) { return a & b; }); break;
      case OP_redux_or: reduce<u32>(w, i, m, [](u32 a, u32 b) { return a | b; }); break;
      case OP_redux_xor: reduce<u32>(w, i, m, [](u32 a, u32 b) { return a ^ b; }); break;
      case OP_redux_min_f32: reduce<f32>(w, i, m, [](f32 a, f32 b) { return pick(a, b, false, false); }); break;
      case OP_redux_max_f32: reduce<f32>(w, i, m, [](f32 a, f32 b) { return pick(a, b, true, false); }); break;
      case OP_redux_min_NaN_f32: reduce<f32>(w, i, m, [](f32 a, f32 b) { return pick(a, b, false, true); }); break;
      case OP_redux_max_NaN_f32: reduce<f32>(w, i, m, [](f32 a, f32 b) { return pick(a, b, true, true); }); break;
      default: break;
    }
    if (pairs) put(w, i.dst[0], m, low, high);
    if (truncates) put(w, i.dst[0], m, low, low);
    if (i.op == OP_div_s32 || i.op == OP_div_u32 || i.op == OP_rem_s32 || i.op == OP_rem_u32) {
      for (int l = 0; l < LANES; l++)
        if ((m >> l & 1) && u32(w.r(i.src[1])[l]) == 0) w.undefined[i.dst[0]] |= 1u << l;
    }
  }

  void run_program(s32 number) {
    program = number;
    epoch = 0;
    s64 at[3] = {number % L.grid[0], number / L.grid[0] % L.grid[1], number / L.grid[0] / L.grid[1]};
    std::fill(shared_state.begin(), shared_state.end(), UNDEFINED);
    std::fill(shared_shadow.begin(), shared_shadow.end(), Shadow());
    for (Warp& w : warps) {
      std::fill(w.undefined.begin(), w.undefined.end(), ~0u);
      std::fill(w.high.begin(), w.high.end(), ~0u);
      for (int k = 0; k < L.num_constants; k++)
        w.undefined[L.constant_register[k]] = w.high[L.constant_register[k]] = 0;
      for (int k = 0; k < 9; k++)
        if (L.special[k] >= 0) w.undefined[L.special[k]] = w.high[L.special[k]] = 0;
      for (int k = 0; k < 3; k++) fill(w, L.special[1 + k], at[k]);
      w.pc = 0;
      w.mask = w.alive = ~0u;
      w.blocked = 0;
      w.others = INT_MAX;
      w.hard = w.soft = 0;
      w.at_barrier = false;
      std::fill_n(w.pcs, LANES, 0);
    }
    std::vector<Warp*> ready;
    while (!dead) {
      ready.clear();
      Warp* waiting = nullptr;
      bool ended = false;
      for (Warp& w : warps) {
        if (!w.alive)
          ended = true;
        else if (w.at_barrier)
          waiting = &w;
        else
          ready.push_back(&w);
      }
      if (!ready.empty()) {
        run(*ready[random() % ready.size()], 1 + random() % 997);
        continue;
      }
      if (!waiting) return;
      if (ended) fault(BARRIER_AFTER_EXIT, waiting->pc, waiting->number * LANES);
      for (Warp& w : warps)
        if (w.at_barrier && w.pc != waiting->pc) fault(DIFFERENT_BARRIERS, w.pc, w.number * LANES, waiting->pc);
      epoch++;
      for (Warp& w : warps)
        if (w.at_barrier) {
          w.at_barrier = false;
          w.hard++;
          w.soft++;
          go(w, w.pc + 1);
        }
    }
  }
};

extern "C" const char* names() { return OP_NAMES; }
extern "C" void run_launch(Launch* launch) {
  noisy = launch->noise;
  Machine machine(*launch);
  s64 programs = launch->grid[0] * launch->grid[1] * launch->grid[2];
  std::vector<s32> order(programs);
  for (s64 k = 0; k < programs; k++) order[k] = k;
  if (launch->seed)
    for (s64 k = programs - 1; k > 0; k--) std::swap(order[k], order[machine.random() % (k + 1)]);
  for (s32 number : order) {
    if (machine.dead) break;
    machine.run_program(number);
  }
}
