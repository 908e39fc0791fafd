/* The one definition of a page: where codes, scales and zero points lie, and which slots a query reads from where.
 *
 * Shared by the CPU kernels, the CUDA kernels and, through kvrt_page_layout() and kvrt_boundary(), by the tests that
 * hold kvcli/quant/layout.py and kvcli/plan.py against it. Plain C, no includes but <stdint.h>.
 *
 *   page   | head 0                                                         | head 1 ...
 *          | K codes | K scales | K zeros | V codes | V scales | V zeros | pad | ...
 *
 *   Every section begins at a multiple of 16 bytes from the head's start, and a head's slice is a multiple of 16 bytes.
 *   Heads are apart, so that a tensor-parallel rank owns a contiguous slice.
 *
 *   codes    [block_size][head_dim], dense: a token's row is one little-endian bit stream, code c at bits c*b ... c*b+b-1
 *            counted from the least significant bit of the row's first byte. A row is head_dim * b / 8 bytes.
 *            4 bits, head_dim 8:   byte 0 = c1 c0 | byte 1 = c3 c2 | byte 2 = c5 c4 | byte 3 = c7 c6   (high, low nibble)
 *            3 bits, 8 codes:      byte 0 = c2[1:0] c1 c0 | byte 1 = c5[0] c4 c3 c2[2] | byte 2 = c7 c6 c5[2:1]
 *            16 (32) bits: the values themselves in the page dtype (float32).
 *   scales   token axis: [block_size][head_dim / group]; channel axis: [block_size / group][head_dim]. float16, or e5m3:
 *            a positive float16 without its sign and its seven lowest mantissa bits, so value = half(byte << 7).
 *   zeros    like the scales, always float16; asymmetric formats only.
 *
 *   A code means, with the scale s and the zero point z of its group and top = 2^bits - 1:
 *     symmetric   (code - top / 2) * s        asymmetric   code * s + z        table   levels[code] * s
 *
 * Beside the pages each sequence has a slot in two fixed pools of exact values (the plan's exact dtype):
 *   sinks    [slot][K, V][num_kv_heads][sink_tokens][head_dim]   the first tokens; they override their packed copies
 *   tail     [slot][K, V][num_kv_heads][tail_tokens][head_dim]   a ring: token t lies at t % tail_tokens. It holds every
 *            token from boundary(n) on; tail_tokens = residual_window + block_size - 1, and 0 in a portable layer.
 */
#ifndef KV_LAYOUT_H
#define KV_LAYOUT_H

#include <stdint.h>

#if defined(__CUDACC__)
#define KV_INLINE static __host__ __device__ __forceinline__
#else
#define KV_INLINE static inline
#endif

enum { KV_ALIGNMENT = 16, KV_MAX_LEVELS = 16, KV_MAX_HEAD_DIM = 256, KV_MAX_BLOCK_SIZE = 128 };
typedef enum { KV_TOKEN = 0, KV_CHANNEL = 1 } kv_axis;
typedef enum { KV_F32 = 0, KV_F16 = 1, KV_BF16 = 2 } kv_dtype;
typedef enum { KV_SCALE_F16 = 0, KV_SCALE_E5M3 = 1 } kv_scale_dtype;

/* How the keys or the values of one layer are stored: kvcli.quant.format.KVFormat, and what is done before. */
typedef struct kv_format {
  int32_t bits;        /* 2, 3, 4, 8; 16: values in the page dtype; 32: float32 (tests) */
  int32_t axis;        /* kv_axis */
  int32_t group;       /* values that share a scale */
  int32_t symmetric;   /* else there are zero points */
  int32_t scale_dtype; /* kv_scale_dtype */
  int32_t table;       /* levels[] counts instead of the uniform grid */
  int32_t hadamard;    /* each head's vector is rotated first; never with the channel axis or exact values */
  int32_t level_steps; /* levels[] are whole multiples of 1 / level_steps, at most 127 of them; 0: any (slow on AVX-512) */
  float levels[KV_MAX_LEVELS]; /* 2^bits levels in rising order */
} kv_format;

/* One layer: kvcli.plan.LayerPlan with what the plan says of all layers. */
typedef struct kv_layer {
  kv_format k, v;
  int32_t num_heads, num_kv_heads, head_dim; /* query heads of a group are adjacent: head h reads kv head h / group */
  int32_t block_size, sink_tokens, residual_window, tail_tokens;
  int32_t window;      /* sliding attention: a query at t sees t - window + 1 ... t; 0: all */
  int32_t portable;    /* tokens go straight into pages, nothing lies beside them; boundary(n) = n */
  int32_t rope_before; /* coded keys are stored before RoPE */
  int32_t page_dtype;  /* kv_dtype of 16-bit pages */
  int32_t exact_dtype; /* kv_dtype of sinks and tail */
  float softmax_scale;
  float softcap;            /* scores become softcap * tanh(score / softcap); 0: none */
  const float *k_mean;      /* [num_kv_heads][head_dim] before RoPE, or null; ignored by exact formats */
  const float *v_mean;      /* [num_kv_heads][head_dim], or null; ignored by exact formats */
  const float *rope;        /* [rope_positions][head_dim]: head_dim / 2 cosines, then head_dim / 2 sines */
  int64_t rope_positions;
  const float *v_weight;    /* [num_kv_heads * head_dim] inputs, each with as many outputs: pages hold what the layer's own
                               keys, as decoded and before RoPE, do not tell of the values; v_mean is the bias. Or null */
} kv_layer;

/* Byte offsets of one head's slice. */
typedef struct kv_page_layout {
  int64_t k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, head_bytes;
} kv_page_layout;

KV_INLINE int kv_is_exact(const kv_format *f) { return f->bits >= 16; }

KV_INLINE int64_t kv_align(int64_t bytes) { return (bytes + KV_ALIGNMENT - 1) / KV_ALIGNMENT * KV_ALIGNMENT; }

/* Bytes of one token's codes in one head. */
KV_INLINE int64_t kv_row_bytes(const kv_format *f, int head_dim) { return (int64_t)head_dim * f->bits / 8; }

/* Groups, and so scales, of one head's slice of a page. */
KV_INLINE int64_t kv_num_groups(const kv_format *f, int head_dim, int block_size) {
  return kv_is_exact(f) ? 0 : (int64_t)head_dim * block_size / f->group;
}

KV_INLINE int64_t kv_scale_bytes(const kv_format *f, int head_dim, int block_size) {
  return kv_num_groups(f, head_dim, block_size) * (f->scale_dtype == KV_SCALE_E5M3 ? 1 : 2);
}

KV_INLINE int64_t kv_zero_bytes(const kv_format *f, int head_dim, int block_size) {
  return f->symmetric ? 0 : kv_num_groups(f, head_dim, block_size) * 2;
}

KV_INLINE kv_page_layout kv_layout_of(const kv_layer *l) {
  kv_page_layout at;
  const int d = l->head_dim, b = l->block_size;
  at.k_codes = 0;
  at.k_scales = kv_align(at.k_codes + kv_row_bytes(&l->k, d) * b);
  at.k_zeros = kv_align(at.k_scales + kv_scale_bytes(&l->k, d, b));
  at.v_codes = kv_align(at.k_zeros + kv_zero_bytes(&l->k, d, b));
  at.v_scales = kv_align(at.v_codes + kv_row_bytes(&l->v, d) * b);
  at.v_zeros = kv_align(at.v_scales + kv_scale_bytes(&l->v, d, b));
  at.head_bytes = kv_align(at.v_zeros + kv_zero_bytes(&l->v, d, b));
  return at;
}

/* First slot that is read exactly once a sequence holds n tokens; slots below are read from pages. */
KV_INLINE int64_t kv_boundary(const kv_layer *l, int64_t n) {
  if (l->portable) return n;
  return n <= l->residual_window ? 0 : (n - l->residual_window) / l->block_size * l->block_size;
}

/* First slot that the query at n - 1 sees. */
KV_INLINE int64_t kv_first_visible(const kv_layer *l, int64_t n) {
  return l->window > 0 && n > l->window ? n - l->window : 0;
}

#endif
