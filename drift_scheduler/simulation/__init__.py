"""The serving loop without a device: the real gang and dispatchers on a clock that jumps.

trace       requests: when they come, how long they are, which prefix blocks they share
kv_pool     a KV pool with a prefix cache, by blocks
engine      gang.Engine over such a pool; its jobs only take time
replica     one GPU: gang, engine, lanes, clock
routing     which replica serves a request
cluster     many replicas, event by event
results     what came of it
goodput     the highest rate that still meets the SLO
"""
