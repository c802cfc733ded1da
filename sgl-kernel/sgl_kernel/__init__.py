"""GPU kernels in Triton that a library lacks, each below its plain-torch reference.

One module a kernel family: kv_store, prefill_attention, decode_attention, sm_ids. Importing the
package loads neither torch nor Triton; importing one of its modules loads both. Kernels run on
the current stream, keep no state, and own no scratch memory: whoever launches on two streams at
once brings scratch for each.
"""
