"""What a clean end writes to files: blocks that are on the device alone."""

from collections.abc import Iterator

from jaxllm.core.kv_cache_manager import KVCacheManager


def unfiled_blocks(kv_cache: KVCacheManager) -> Iterator[tuple[int, bytes]]:
    """(block, name) of the full blocks that nobody uses any more and that have no file. First what
    was used last, and of its chain the beginning: without that, the rest is of no use.
    """
    for block_id in reversed(list(kv_cache.pool.free_blocks())):
        name = kv_cache.prefix.hash_of(block_id)
        if name is not None and kv_cache.disk.wants(name):
            yield block_id, name
