"""GPU kernels in Triton that a library lacks, each with its plain-torch reference.

One module a kernel family: prefill_attention, decode_attention, matmul, greedy, sm_ids, and those
of a layer's element-wise part: rms_norm, rotate_and_store, silu_and_mul. A reference stands above
its kernel; those of the element-wise part also serve models on CPUs and stand in elementwise_ref,
which needs no Triton. Importing the package loads neither torch nor Triton. Kernels run on the
current stream, keep no state, and own no scratch memory: whoever launches on two streams at once
brings scratch for each.
"""
