/* kvrt: the native runtime of kvcli, a plain C ABI.
 *
 * One header, several libraries that export the same functions: CPU kernels, CUDA kernels, and the CUDA kernels compiled
 * for the CPU in the tests. Pointers are host pointers for the CPU and device pointers for CUDA; the structs themselves
 * and the layer they point to are always in host memory and are copied before a function returns. Nothing here needs
 * torch, allocates memory that outlives a call, throws or aborts: every function returns a kvrt_status.
 *
 * A step over a batch appends the new tokens of every sequence (kvrt_append) and then attends from them
 * (kvrt_attend, one query a sequence). Both take lengths as they were BEFORE the step, so that a captured CUDA graph
 * replays with lengths that only the host's bookkeeping advances. With n = lengths[s] + new, the query at n - 1 sees
 *   sinks (exact) | slots sink_tokens ... boundary(n) - 1 from pages | slots boundary(n) ... n - 1 from the tail (exact)
 * cut by the sliding window where there is one. Prefill expands pages (kvrt_expand) and uses any dense attention.
 */
#ifndef KVRT_H
#define KVRT_H

#include "kv_layout.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVRT_VERSION 3

#if defined(_WIN32)
#define KVRT_API __declspec(dllexport)
#else
#define KVRT_API __attribute__((visibility("default")))
#endif

typedef enum {
  KVRT_OK = 0,
  KVRT_INVALID = 1,     /* an argument that contradicts another: the caller's mistake */
  KVRT_UNSUPPORTED = 2, /* legal, and not implemented by this library */
  KVRT_NO_MEMORY = 3,
  KVRT_DEVICE = 4       /* the CUDA runtime reported an error */
} kvrt_status;

/* How to run: threads on the CPU (0: all that OpenMP would take), a cudaStream_t on a GPU. */
typedef struct kvrt_exec {
  int32_t threads;
  int32_t reserved;
  void *stream;
} kvrt_exec;

/* The storage of one layer, and which of it belongs to which sequence of the batch. */
typedef struct kvrt_cache {
  uint8_t *pages;               /* [pool][num_kv_heads * head_bytes]; CUDA wants 16-byte alignment here and below */
  void *tail;                   /* kv_layout.h; exact dtype */
  void *sinks;
  const int32_t *block_tables;  /* [num_seqs][...]: pool index of each logical page; -1: not there */
  int64_t block_table_stride;   /* entries from one sequence to the next */
  int64_t block_table_head_stride; /* entries from one kv head to the next; 0: heads share a list */
  const int32_t *lengths;       /* [num_seqs]: tokens held before this step */
  int64_t length_head_stride;   /* with length_stride: a length per kv head; 0: heads share one */
  int64_t length_stride;        /* entries from one sequence to the next; usually 1 */
  const int32_t *slots;         /* [num_seqs]: row of sinks and tail; null: sequence s has row s */
  const int32_t *positions;     /* [num_seqs][...]: the RoPE position of each slot; null: the slot itself */
  int64_t position_stride;
  int32_t num_seqs;
  int32_t max_pages;            /* entries of a block table that may be read: bounds every grid */
} kvrt_cache;

/* Append new tokens: pack what leaves the window, keep the rest in the tail, and fill the sinks. */
typedef struct kvrt_append_args {
  kvrt_cache cache;
  const int32_t *starts;   /* [num_seqs + 1]: first row of each sequence in k and v; null: one row each */
  int32_t max_new;         /* the most rows any sequence has: bounds the grid */
  int32_t dtype;           /* kv_dtype of k and v */
  const void *k, *v;       /* [rows][num_kv_heads][head_dim], keys after RoPE, channels contiguous; rounded to the exact
                              dtype on entry (float16 etc.), before anything is quantised. One of the two may be null: it
                              is appended by another call, values after keys where they are predicted from them */
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride; /* in values */
  const float *k_predicted, *v_predicted; /* [slots][num_kv_heads][head_dim] from the boundary before the step to the one
                              after it, of one sequence; keys before RoPE. Taken off in the mean's place; or null */
} kvrt_append_args;

enum { KVRT_PACKED = 1, KVRT_EXACT = 2, KVRT_ALL = 3 };

/* Attend from the last token of every sequence. A part that sees nothing gives zeros and an lse of -infinity. */
typedef struct kvrt_attend_args {
  kvrt_cache cache;        /* lengths as before the step: n = length + 1 */
  int32_t parts;           /* KVRT_PACKED, KVRT_EXACT (sinks and tail), or both */
  int32_t dtype;           /* kv_dtype of q and out */
  const void *q;           /* [num_seqs][num_heads][head_dim] after RoPE */
  void *out;               /* [num_seqs][num_heads][head_dim] */
  int64_t q_row_stride, q_head_stride, out_row_stride, out_head_stride; /* in values */
  const int32_t *query_positions; /* [num_seqs], null: n - 1; what a sliding window counts from when positions are given */
  float *lse;              /* [num_seqs][num_heads] natural-log sum of exponentials, or null */
  float *mass;             /* [num_seqs][num_heads][mass_stride]: softmax weight per slot, 0 where unseen, or null; a row
                              has room for every slot seen */
  int64_t mass_stride;
  float *key_sum;          /* [num_seqs][num_heads][num_kv_heads][head_dim]: sum over packed tokens of weight * K^ before
                              RoPE, for the heads' own weights over the keys of ALL kv heads, or null; CUDA needs mass as
                              well, but for layers with v_weight */
  float *packed_mass;      /* [num_seqs][num_heads]: weight of the packed tokens, or null */
  int32_t splits;          /* parts a sequence's pages are cut into; at least 1 */
  int32_t split_pages;     /* 0: pages are cut evenly. Else split i takes pages i*split_pages ..., the last one the rest,
                              and sums are in an order that neither batch nor number of splits changes */
  void *workspace;         /* kvrt_attend_workspace() bytes, 16-byte aligned; contents undefined before and after */
  int64_t workspace_bytes;
} kvrt_attend_args;

/* Decode pages into dense keys and values. */
typedef struct kvrt_expand_args {
  kvrt_cache cache;        /* lengths are not read */
  int32_t sequence;        /* which one */
  int32_t dtype;           /* kv_dtype of k and v */
  int64_t first, count;    /* slots; all must have been packed */
  void *k, *v;             /* [num_kv_heads][count][head_dim]; either may be null */
  int64_t k_head_stride, k_row_stride, v_head_stride, v_row_stride; /* in values */
  int32_t keys_before_rope; /* else after */
  int32_t with_sinks;       /* slots below sink_tokens get their exact values (never with keys_before_rope) */
} kvrt_expand_args;

/* A chunk of one sequence attends, from keys and values written out: float32 [num_kv_heads][count][head_dim], rows
 * next to each other, of slots from *_first on. Which of them the query of token start + i sees is the layer's rule:
 * packed ones below its boundary, exact ones from there to itself. */
typedef struct kvrt_chunk_args {
  const void *q;           /* [tokens][num_heads][head_dim] of dtype, after RoPE */
  void *out;               /* the same of out_dtype */
  float *lse;              /* [num_heads][tokens], the log of the sum of exponentials; or null */
  int64_t q_row_stride, out_row_stride; /* in values */
  int32_t dtype, out_dtype;
  int64_t start, tokens;
  const float *packed_k, *packed_v, *exact_k, *exact_v;
  int64_t packed_first, packed_count, packed_head_stride, exact_first, exact_count, exact_head_stride;
} kvrt_chunk_args;

/* What a variant of the kernels is called and whether this machine runs it; for `kvcli doctor`. */
KVRT_API int kvrt_version(void);
KVRT_API const char *kvrt_kind(void); /* "cpu" or "cuda" */
KVRT_API const char *kvrt_status_text(int status);
/* Name of variant i (best first), null past the last. *reason is null if it runs here, else why not. */
KVRT_API const char *kvrt_variant(int i, const char **reason);
/* Use a variant by name ("avx512", "avx2", "portable"; "cuda"); null: the best one that runs. */
KVRT_API int kvrt_use_variant(const char *name);
KVRT_API const char *kvrt_current_variant(void);

/* The layout, as the header sees it: for tests. */
KVRT_API int kvrt_page_layout(const kv_layer *layer, kv_page_layout *out);
KVRT_API int64_t kvrt_boundary(const kv_layer *layer, int64_t n);

KVRT_API int kvrt_append(const kv_layer *layer, const kvrt_append_args *args, const kvrt_exec *exec);
/* With v_weight CUDA takes room for the weights of rope_positions slots, which no sequence may pass. */
KVRT_API int64_t kvrt_attend_workspace(const kv_layer *layer, int32_t num_seqs, int32_t splits);
KVRT_API int kvrt_attend(const kv_layer *layer, const kvrt_attend_args *args, const kvrt_exec *exec);
KVRT_API int kvrt_expand(const kv_layer *layer, const kvrt_expand_args *args, const kvrt_exec *exec);
/* CPU only so far; head_dim a multiple of 16, no softcap. */
KVRT_API int kvrt_attend_chunk(const kv_layer *layer, const kvrt_chunk_args *args, const kvrt_exec *exec);

/* The small fused operations of a decoder layer. All vectors contiguous; x, y of kv_dtype `dtype`; sums in float32. */

/* Orthonormal Hadamard transform of each row (blocks of the largest power of two that divides head_dim), float32. */
KVRT_API int kvrt_hadamard(float *out, const float *x, int64_t rows, int32_t head_dim, const kvrt_exec *exec);
/* y = x / sqrt(mean(x^2) + eps) * weight. If residual is not null: residual += x first (in dtype), and y is its norm. */
KVRT_API int kvrt_rms_norm(void *y, const void *x, void *residual, const void *weight, int64_t rows, int32_t width,
                           float eps, int32_t dtype, const kvrt_exec *exec);
/* In place on qkv [rows][num_heads + 2 num_kv_heads][head_dim]: optional per-head RMSNorm of q and k (QK-norm, weights
   [head_dim] or null), then RoPE at positions[rows] by the table `rope` (kv_layer.rope). */
KVRT_API int kvrt_rope(void *qkv, const int32_t *positions, const float *rope, int64_t rope_positions,
                       const void *q_norm, const void *k_norm, float eps, int64_t rows, int32_t num_heads,
                       int32_t num_kv_heads, int32_t head_dim, int32_t dtype, const kvrt_exec *exec);
/* y [rows][width] = silu(gate) * up, where x is [rows][2 width]: gate, then up. */
KVRT_API int kvrt_silu_mul(void *y, const void *x, int64_t rows, int32_t width, int32_t dtype, const kvrt_exec *exec);

/* How a 4-bit code becomes a weight. */
enum {
  KVRT_GRID_ZERO_WEIGHT = 0, /* code * scale + zero */
  KVRT_GRID_ZERO_CODE = 1,   /* (code - zero) * scale, zero a whole number: AutoGPTQ's */
  KVRT_GRID_NF4 = 2          /* NF4[code] * scale, QLoRA's table; products take it to 1/16383 of the scale */
};

/* Linear layers with weights of 4-bit codes; `group` inputs of an output share scale and zero, both float16. Bytes lie as
 * cpu/int4.h shows, outputs padded to a multiple of 16. CPU only so far.
 *
 * y [rows][out_features] of out_dtype = x [rows][in_features] W^T + bias, x and bias (or null) of dtype. Each group of
 * activations is rounded to 1/16256 of its largest with 16 activation_bits, made for a few rows, and to 1/127 with 8, made
 * for any number; sums are exact and no row depends on another. */
KVRT_API int kvrt_int4_matmul(void *y, const void *x, const void *weights, const void *bias, int64_t rows,
                              int32_t out_features, int32_t in_features, int32_t group, int32_t grid, int32_t dtype,
                              int32_t out_dtype, int32_t activation_bits, const kvrt_exec *exec);

/* Weights of outputs first ... first + count - 1 as bf16 [in_features][count], for a product of many rows; first and
 * count are multiples of 16. */
KVRT_API int kvrt_int4_expand(void *out, const void *weights, int32_t first, int32_t count, int32_t in_features,
                              int32_t group, int32_t grid, const kvrt_exec *exec);

#ifdef __cplusplus
}
#endif
#endif
