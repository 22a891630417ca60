// The products of a low-rank update and of its frozen weight in bf16, for CPUs whose AMX multiplies tiles.
//
// A tile has 16 rows of 64 bytes. The instruction adds to a tile of 16 x 16 numbers in fp32 the product of one of
// 16 x 32 in bf16, which may be read from a matrix as it is, and of one of 32 x 16, whose rows have to lie in pairs:
// "packed" below. Two of each at a time, four sums: all eight tiles that there are.
//
// Numbers in bf16 are moved as 16-bit integers. All matrices are contiguous, all features multiples of 32.
//
// A mask of dropout is a function of its seed and of an element's place: one block of ARS-5 (Salmon et al. 2011, "Parallel
// random numbers: as easy as 1, 2, 3", section 4.1), counted by the row and the column, decides about eight elements. So
// each kernel draws the same mask while it reads, in any order.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace {

using i64 = int64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr i64 TILE = 256;            // 32-bit words of a tile
constexpr i64 BLOCK = 128;           // rows whose outer products are added up in tiles
constexpr i64 GROUP_BYTES = 1 << 19; // of a weight, packed at a time: stays in a core's cache
constexpr int MOST_THREADS = 256;

constexpr i64 parts(i64 n, i64 size) { return (n + size - 1) / size; }

// Memory that is kept for the next call, as much as was ever needed; never zeroed.
class Buffer {
 public:
  template <class T>
  T* get(i64 count) {
    const size_t need = count * sizeof(T);
    if (need > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<char*>(::operator new(need, std::align_val_t(64))));
      size_ = need;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(char* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

struct Buffers {
  Buffer packed, weight, sums, left, narrow, low, rows;
};
thread_local Buffers buffers;

// All tiles of this thread, whole ones.
class Tiles {
 public:
  // GCC's intrinsics do not say that tiles are loaded from memory: what was written there has to be there.
  static void settle() { asm volatile("" ::: "memory"); }

  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      u16 bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    std::fill_n(config.bytes, 8, 64);
    std::fill_n(config.rows, 8, 16);
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

__mmask32 first(i64 n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

__m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

__m512 to_fp32(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }

// Transposes 16 x 16 numbers of 32 bits.
void transpose(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      v[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
      v[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
    }
  for (int h = 0; h < 2; h++)
    for (int i = 0; i < 4; i++) {
      t[8 * h + i] = _mm512_shuffle_i32x4(v[8 * h + i], v[8 * h + i + 4], 0x88);
      t[8 * h + i + 4] = _mm512_shuffle_i32x4(v[8 * h + i], v[8 * h + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// 16 numbers of a row, each with that below it; zeros beyond the width and the rows that there are.
__m512i pairs(const u16* row, i64 stride, i64 width, i64 rows) {
  const __mmask16 inside = first(std::min<i64>(16, width));
  const __m512i above = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows > 0 ? inside : 0, row));
  const __m512i below = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows > 1 ? inside : 0, row + stride));
  return _mm512_or_si512(above, _mm512_slli_epi32(below, 16));
}

// 32 numbers of a row, each with that below it.
void interleave(const u16* row, i64 stride, u32* low_half, u32* high_half) {
  alignas(64) static const u16 order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i above = _mm512_loadu_si512(row), below = _mm512_loadu_si512(row + stride);
  _mm512_store_si512(low_half, _mm512_permutex2var_epi16(above, low, below));
  _mm512_store_si512(high_half, _mm512_permutex2var_epi16(above, high, below));
}

// in[depth][width], packed: tiles [depth / 32][width / 16], zeros beyond.
void pack(const u16* in, i64 depth, i64 width, u32* out) {
  const i64 columns = parts(width, 16);
  for (i64 d = 0; d < parts(depth, 32); d++)
    for (i64 p = 0; p < 16; p++)
      for (i64 n = 0; n < columns; n++) {
        const i64 row = 32 * d + 2 * p;
        const __m512i v = pairs(in + row * width + 16 * n, width, width - 16 * n, depth - row);
        _mm512_store_si512(out + (d * columns + n) * TILE + 16 * p, v);
      }
}

// The transpose of in[width][depth], packed in the same way.
void pack_transpose(const u16* in, i64 depth, i64 width, u32* out) {
  const i64 columns = parts(width, 16);
  for (i64 n = 0; n < columns; n++)
    for (i64 d = 0; d < parts(depth, 32); d++) {
      __m512i v[16];
      for (i64 j = 0; j < 16; j++) {
        const __mmask32 inside = 16 * n + j < width ? first(depth - 32 * d) : 0;
        v[j] = _mm512_maskz_loadu_epi16(inside, in + (16 * n + j) * depth + 32 * d);
      }
      transpose(v);
      for (i64 j = 0; j < 16; j++) _mm512_store_si512(out + (d * columns + n) * TILE + 16 * j, v[j]);
    }
}

// 32 rows of panels of 32 columns, packed: two tiles of each panel, `stride` words from one panel to the next.
void pack_panels(const u16* W, i64 width, i64 panels, i64 stride, u32* out) {
  for (i64 p = 0; p < 16; p++, W += 2 * width)
    for (i64 n = 0; n < panels; n++) {
      u32* to = out + n * stride + 16 * p;
      interleave(W + 32 * n, width, to, to + TILE);
    }
}

// A panel of 32 columns of the transpose of W[width][depth], packed in the same way: tiles [depth / 32][2].
void pack_panel_of_transpose(const u16* W, i64 depth, u32* out) {
  for (i64 d = 0; d < depth / 32; d++)
    for (i64 t = 0; t < 2; t++, out += TILE) {
      __m512i v[16];
      for (i64 j = 0; j < 16; j++) v[j] = _mm512_loadu_si512(W + (16 * t + j) * depth + 32 * d);
      transpose(v);
      for (i64 j = 0; j < 16; j++) _mm512_store_si512(out + 16 * j, v[j]);
    }
}

// One draw: an element is dropped if its 16 random bits are less than the threshold.
struct Dropout {
  u64 seed = 0;
  u32 threshold = 0;

  // Which of 32 elements of a row are kept.
  __mmask32 kept(i64 row, i64 column) const {
    const i64 block = column / 8;
    const __m512i weyl = _mm512_set4_epi64(0xBB67AE8584CAA73B, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B, 0x9E3779B97F4A7C15);
    __m512i key = _mm512_set4_epi64(0, seed, 0, seed);
    __m512i value = _mm512_set_epi64(row, block + 3, row, block + 2, row, block + 1, row, block);
    value = _mm512_xor_si512(value, key);
    for (int round = 0; round < 4; round++) {
      key = _mm512_add_epi64(key, weyl);
      value = _mm512_aesenc_epi128(value, key);
    }
    value = _mm512_aesenclast_epi128(value, _mm512_add_epi64(key, weyl));
    return _mm512_cmpge_epu16_mask(value, _mm512_set1_epi16(static_cast<short>(threshold)));
  }
};

// `rows` rows from `row` on as they are kept, and zeros for the others up to `whole`.
const u16* kept_rows(const u16* in, i64 rows, i64 whole, i64 width, const Dropout& drop, i64 row) {
  if (rows == whole && !drop.threshold) return in;
  u16* out = buffers.rows.get<u16>(whole * width);
  std::memset(out + rows * width, 0, (whole - rows) * width * sizeof(u16));
  if (!drop.threshold) {
    std::memcpy(out, in, rows * width * sizeof(u16));
    return out;
  }
  for (i64 m = 0; m < rows; m++)
    for (i64 n = 0; n < width; n += 32) {
      const i64 place = m * width + n;
      _mm512_storeu_si512(out + place, _mm512_maskz_loadu_epi16(drop.kept(row + m, n), in + place));
    }
  return out;
}

// in[rows][width] as a matrix of 32 rows, with zeros beside the width up to a multiple of 32.
const u16* padded(const u16* in, i64 stride, i64 rows, i64 width) {
  const i64 whole = 32 * parts(width, 32);
  u16* out = buffers.low.get<u16>(32 * whole);
  std::memset(out, 0, 32 * whole * sizeof(u16));
  for (i64 m = 0; m < rows; m++) std::memcpy(out + m * whole, in + m * stride, width * sizeof(u16));
  return out;
}

// Tiles 0 to 3 += 32 rows of 32 numbers times two packed tiles. Those pass through a core's nearest cache with a hint not
// to stay, so that the rows do: a fifth of the time, where the rows fit in it.
inline void multiply(const u16* in, i64 stride, const u32* packed, const u32* packed_too) {
  _tile_stream_loadd(6, packed, 64);
  _tile_loadd(4, in, stride * 2);
  _tile_stream_loadd(7, packed_too, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, in + 16 * stride, stride * 2);
  _tile_dpbf16ps(2, 4, 7);
  _tile_dpbf16ps(1, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store(float* out, i64 stride) {
  _tile_stored(0, out, stride * 4);
  _tile_stored(1, out + 16 * stride, stride * 4);
  _tile_stored(2, out + 16, stride * 4);
  _tile_stored(3, out + 16 * stride + 16, stride * 4);
}

// out[rows][rank] = in[rows][width] packed, of the rows from `row` on of a matrix
void project_rows(const u16* in, i64 width, i64 rows, const u32* packed, i64 rank, const Dropout& drop, i64 row, u16* out) {
  const i64 columns = parts(rank, 16);
  float* sums = buffers.narrow.get<float>(32 * 16 * (columns + 1));
  for (i64 m = 0; m < rows; m += 32, out += 32 * rank) {
    const i64 left = std::min<i64>(32, rows - m);
    const u16* x = kept_rows(in + m * width, left, 32, width, drop, row + m);
    for (i64 n = 0; n < columns; n += 2) {
      // The last of an odd number is multiplied twice: reading is what takes the time.
      const i64 other = n + 1 < columns ? TILE : 0;
      clear();
      Tiles::settle();
      for (i64 d = 0; d < width / 32; d++) {
        const u32* tile = packed + (d * columns + n) * TILE;
        multiply(x + 32 * d, width, tile, tile + other);
      }
      store(sums + 16 * n, 16 * (columns + 1));
    }
    for (i64 i = 0; i < left; i++)
      for (i64 n = 0; n < columns; n++) {
        const __m512 row = _mm512_loadu_ps(sums + (i * (columns + 1) + n) * 16);
        _mm256_mask_storeu_epi16(out + i * rank + 16 * n, first(std::min<i64>(16, rank - 16 * n)),
                                 (__m256i)_mm512_cvtneps_pbh(row));
      }
  }
}

// A block of 32 x 32 sums on its way into the output, a few rows at a time beside the next block's products.
struct Waiting {
  const float* sums = nullptr;
  const float* bias = nullptr;
  u16* out = nullptr;
  i64 width = 0, rows = 0, done = 0;
  bool add = false;

  void write(i64 count) {
    for (const i64 end = std::min(rows, done + count); done < end; done++) {
      u16* o = out + done * width;
      __m512 low = _mm512_load_ps(sums + 32 * done), high = _mm512_load_ps(sums + 32 * done + 16);
      if (add) {
        const __m512i before = _mm512_loadu_si512(o);
        low = _mm512_add_ps(low, to_fp32(_mm512_castsi512_si256(before)));
        high = _mm512_add_ps(high, to_fp32(_mm512_extracti64x4_epi64(before, 1)));
      }
      if (bias) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(bias));
        high = _mm512_add_ps(high, _mm512_loadu_ps(bias + 16));
      }
      _mm512_storeu_si512(o, to_bf16(low, high));
    }
  }
};

// out[rows][width] (+)= in[rows][depth] W + kept(low[rows][rank] P) + bias
struct Sum {
  const u16 *in, *W, *low;
  i64 low_stride;
  const u32* packed;
  const float* bias;
  u16* out;
  i64 rows, depth, width, rank;
  bool transposed, add;  // W[width][depth]; to what is there
  Dropout drop;
};

// What is kept of tiles 0 to 3, the sums of 32 rows and columns.
void keep(const Dropout& drop, i64 row, i64 column, i64 rows, float* sums) {
  store(sums, 32);
  for (i64 m = 0; m < rows; m++) {
    const __mmask32 kept = drop.kept(row + m, column);
    float* low = sums + 32 * m;
    _mm512_store_ps(low, _mm512_maskz_mov_ps(static_cast<__mmask16>(kept), _mm512_load_ps(low)));
    _mm512_store_ps(low + 16, _mm512_maskz_mov_ps(static_cast<__mmask16>(kept >> 16), _mm512_load_ps(low + 16)));
  }
  Tiles::settle();
  _tile_loadd(0, sums, 128);
  _tile_loadd(1, sums + 16 * 32, 128);
  _tile_loadd(2, sums + 16, 128);
  _tile_loadd(3, sums + 16 * 32 + 16, 128);
}

// The products of 32 rows with the columns of some panels. What is left of them waits.
void sum_rows(const Sum& s, i64 row, i64 column, i64 panels, const u32* weight, float (*sums)[32 * 32], Waiting& waiting) {
  const i64 steps = s.depth / 32, low_steps = s.low ? parts(s.rank, 32) : 0;
  const i64 rows = std::min<i64>(32, s.rows - row), at_once = parts(32, steps + low_steps);
  const u16* in = steps ? kept_rows(s.in + row * s.depth, rows, 32, s.depth, {}, 0) : nullptr;
  const u16* low = s.low ? padded(s.low + row * s.low_stride, s.low_stride, rows, s.rank) : nullptr;
  for (i64 n = 0; n < panels; n++, column += 32, weight += 2 * steps * TILE) {
    clear();
    Tiles::settle();
    for (i64 d = 0; d < low_steps; d++) {
      const u32* tile = s.packed + (d * (s.width / 16) + column / 16) * TILE;
      multiply(low + 32 * d, 32 * low_steps, tile, tile + TILE);
      waiting.write(at_once);
    }
    float* own = waiting.sums == sums[0] ? sums[1] : sums[0];
    if (low && s.drop.threshold) keep(s.drop, row, column, rows, own);
    for (i64 d = 0; d < steps; d++) {
      multiply(in + 32 * d, s.depth, weight + 2 * d * TILE, weight + (2 * d + 1) * TILE);
      waiting.write(at_once);
    }
    store(own, 32);
    waiting = {own, s.bias ? s.bias + column : nullptr, s.out + row * s.width + column, s.width, rows, 0, s.add};
  }
}

void sum_of_products(const Sum& s, int threads) {
  const i64 blocks = parts(s.rows, 32), all = s.width / 32, panel = std::max<i64>(1, s.depth) * 32;
  const i64 group = std::max<i64>(1, std::min<i64>(all, GROUP_BYTES / (2 * panel)));
  u32* weight = buffers.weight.get<u32>(group * panel / 2);
#pragma omp parallel num_threads(std::min<i64>(threads, blocks)) if (threads > 1)
  {
    Tiles tiles;
    alignas(64) float sums[2][32 * 32];
    for (i64 start = 0; start < all; start += group) {
      const i64 panels = std::min(group, all - start);
      if (s.transposed) {
#pragma omp for schedule(static)
        for (i64 n = 0; n < panels; n++)
          pack_panel_of_transpose(s.W + 32 * (start + n) * s.depth, s.depth, weight + n * panel / 2);
      } else {
#pragma omp for schedule(static)
        for (i64 d = 0; d < s.depth / 32; d++)
          pack_panels(s.W + 32 * d * s.width + 32 * start, s.width, panels, panel / 2, weight + 2 * d * TILE);
      }
      Waiting waiting;
#pragma omp for schedule(static) nowait
      for (i64 b = 0; b < blocks; b++) sum_rows(s, 32 * b, 32 * start, panels, weight, sums, waiting);
      waiting.write(32);
      if (start + group < all) {
#pragma omp barrier
      }
    }
  }
}

// Tiles [rows / 32][rank / 16] of the transpose of in[rows][rank].
void transpose_rows(const u16* in, i64 stride, i64 rows, i64 rank, u16* out) {
  for (i64 m = 0; m < rows; m += 32)
    for (i64 t = 0; t < rank; t += 16, out += 2 * TILE) {
      __m512i v[16];
      for (i64 p = 0; p < 16; p++) v[p] = pairs(in + (m + 2 * p) * stride + t, stride, rank - t, rows - m - 2 * p);
      transpose(v);
      for (i64 i = 0; i < 16; i++) _mm512_store_si512(out + 32 * i, v[i]);
    }
}

// Tiles sums[width / 32][rank / 16][2] (+)= left^T kept(v[rows][width]), of at most BLOCK rows from `row` on.
void add_outer_product(const u16* in, i64 stride, i64 rank, const u16* v, i64 rows, i64 width, const Dropout& drop, i64 row,
                       bool fresh, const u16* next, float* sums) {
  const i64 columns = parts(rank, 16), steps = parts(rows, 32), ahead = next ? BLOCK : 0;
  u16* left = buffers.left.get<u16>(columns * steps * 2 * TILE);
  alignas(64) u32 packed[BLOCK / 32 * 2 * TILE];
  transpose_rows(in, stride, rows, rank, left);
  v = kept_rows(v, rows, 32 * steps, width, drop, row);
  for (i64 n = 0; n < width; n += 32) {
    // Columns are read here, whose rows no hardware fetches ahead from further than a core's cache.
    for (i64 i = 0; i < ahead; i++, next += 32) _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    for (i64 p = 0; p < 16 * steps; p++) {
      u32* to = packed + p / 16 * 2 * TILE + p % 16 * 16;
      interleave(v + 2 * p * width + n, width, to, to + TILE);
    }
    Tiles::settle();
    for (i64 t = 0; t < columns; t++, sums += 2 * TILE) {
      if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
      } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE, 64);
      }
      for (i64 s = 0; s < steps; s++) {
        _tile_loadd(4, left + (s * columns + t) * 2 * TILE, 64);
        _tile_loadd(6, packed + 2 * s * TILE, 64);
        _tile_loadd(7, packed + (2 * s + 1) * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + TILE, 64);
    }
  }
}

// All threads' sums, in the order of the threads, times a factor, as [rank][width] or its transpose.
void gather(float* const* sums, int count, i64 rank, i64 width, float factor, bool transposed,
            float* out) {
  const i64 columns = parts(rank, 16);
  for (i64 n = 0; n < width / 16; n++)
    for (i64 t = 0; t < columns; t++) {
      const i64 place = ((n / 2 * columns + t) * 2 + n % 2) * TILE, rows = std::min<i64>(16, rank - 16 * t);
      alignas(64) float total[TILE];
      std::memcpy(total, sums[0] + place, sizeof(total));
      for (int k = 1; k < count; k++)
        for (i64 i = 0; i < TILE; i++) total[i] += sums[k][place + i];
      for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < 16; j++) {
          const i64 row = 16 * t + i, column = 16 * n + j;
          out[transposed ? column * rank + row : row * width + column] = total[16 * i + j] * factor;
        }
    }
}

// Rows of a block: fewer where there are more threads than blocks.
i64 block_of(i64 rows, int threads) { return std::min<i64>(BLOCK, 32 * parts(parts(rows, 32), threads)); }

}  // namespace

extern "C" {

// Asks the kernel for the tiles, for the whole process: 0 if it has them.
int lora_request_tiles() {
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return static_cast<int>(syscall(SYS_arch_prctl, request_permission, tile_data));
}

// hidden[rows][rank] = kept(x[rows][width]) A[rank][width]^T
void lora_project(const u16* x, const u16* A, u16* hidden, i64 rows, i64 width, i64 rank, u64 seed, u32 threshold,
                  int threads) {
  const Dropout drop{seed, threshold};
  const i64 block = block_of(rows, threads), blocks = parts(rows, block);
  u32* packed = buffers.packed.get<u32>(width / 32 * parts(rank, 16) * TILE);
  pack_transpose(A, width, rank, packed);
#pragma omp parallel num_threads(std::min<i64>(threads, blocks)) if (threads > 1)
  {
    Tiles tiles;
#pragma omp for schedule(static) nowait
    for (i64 b = 0; b < blocks; b++) {
      const i64 row = b * block;
      project_rows(x + row * width, width, std::min(block, rows - row), packed, rank, drop, row, hidden + row * rank);
    }
  }
}

// out[rows][width] (+)= in[rows][depth] W + kept(low[rows][rank] small) + bias, of W[depth][width] and small[rank][width], or
// of the transpose of W[width][depth] or of small[width][rank]; `in` with W, `low` with `small`, and `bias` may be null.
void lora_sum(const u16* in, const u16* W, const u16* low, i64 low_stride, const u16* small, const float* bias, u16* out,
              i64 rows, i64 depth, i64 width, i64 rank, int transposed, int small_transposed, int add, u64 seed,
              u32 threshold, int threads) {
  u32* packed = nullptr;
  if (low) {
    packed = buffers.packed.get<u32>(parts(rank, 32) * (width / 16) * TILE);
    small_transposed ? pack_transpose(small, rank, width, packed) : pack(small, rank, width, packed);
  }
  const i64 used = in ? depth : 0;
  const Dropout drop{seed, threshold};
  sum_of_products({in, W, low, low_stride, packed, bias, out, rows, used, width, rank, transposed != 0, add != 0, drop},
                  threads);
}

// inner[rows][rank] = v[rows][width] B[width][rank], unless `inner` is null, and factor left[rows][rank]^T kept(v), as it
// is or transposed, unless `left` is null.
void lora_pull_back(const u16* v, const u16* B, u16* inner, const u16* left, i64 left_stride, float* gradient, i64 rows,
                    i64 width, i64 rank, float factor, int transposed, u64 seed, u32 threshold, int threads) {
  const Dropout drop{seed, threshold};
  const i64 block = block_of(rows, threads), blocks = parts(rows, block), columns = parts(rank, 16);
  u32* packed = nullptr;
  if (inner) {
    packed = buffers.packed.get<u32>(width / 32 * columns * TILE);
    pack(B, width, rank, packed);
  }
  float* sums[MOST_THREADS];
  int used = 1;
#pragma omp parallel num_threads(std::min<i64>(std::min(threads, MOST_THREADS), blocks)) if (threads > 1)
  {
    Tiles tiles;
    float* own = sums[omp_get_thread_num()] = buffers.sums.get<float>(columns * (width / 16) * TILE);
    bool fresh = true;
    if (omp_get_thread_num() == 0) used = omp_get_num_threads();
#pragma omp for schedule(static) nowait
    for (i64 b = 0; b < blocks; b++) {
      const i64 row = b * block, count = std::min(block, rows - row);
      const u16* own_rows = v + row * width;
      if (inner) project_rows(own_rows, width, count, packed, rank, {}, row, inner + row * rank);
      const u16* next = rows - row >= 2 * BLOCK ? own_rows + BLOCK * width : nullptr;
      if (left) add_outer_product(left + row * left_stride, left_stride, rank, own_rows, count, width, drop, row, fresh, next, own);
      fresh = false;
    }
  }
  if (left) gather(sums, used, rank, width, factor, transposed != 0, gradient);
}

// out[rows][width]: -1 for what is kept, 0 for what is dropped.
void lora_mask(int8_t* out, i64 rows, i64 width, u64 seed, u32 threshold) {
  const Dropout drop{seed, threshold};
  for (i64 m = 0; m < rows; m++)
    for (i64 n = 0; n < width; n += 32)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + m * width + n), _mm256_movm_epi8(drop.kept(m, n)));
}
}
