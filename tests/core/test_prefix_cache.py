import numpy as np

from jaxllm.core.prefix_cache import MOST_CONTINUATIONS, BlockHasher, PrefixCache

TOKENS = np.arange(12, dtype=np.int32)


def chain_of(key: bytes = b"k", *identity: str, tokens: np.ndarray = TOKENS) -> list[bytes]:
    hasher = BlockHasher(key, 4)
    chain = [hasher.root(*identity)]
    hasher.extend(chain, tokens)
    return chain


def test_hashes_need_the_key():
    assert not set(chain_of(b"k")) & set(chain_of(b"other"))


def test_hashes_tell_everything_that_a_block_depends_on():
    assert chain_of() == chain_of()
    assert not set(chain_of(b"k", "a", "b")) & set(chain_of(b"k", "ab", ""))
    early = TOKENS.copy()
    early[0] = 99
    assert not set(chain_of(tokens=early)[1:]) & set(chain_of()[1:])
    assert chain_of(tokens=TOKENS[:11]) == chain_of()[:3]  # full blocks only


def test_the_longest_common_beginning_is_found():
    cache, parent = PrefixCache(), b"p"
    cache.add(1, parent, TOKENS[:3], None)
    cache.add(2, parent, TOKENS[:4], b"full")
    assert cache.find_similar(parent, np.array([0, 1, 9], np.int32)) == (2, 2)
    assert cache.find_similar(parent, TOKENS[:4]) == (2, 4)
    assert cache.find_similar(b"other", TOKENS[:4]) == (0, 0)
    cache.discard(2)
    assert cache.find(b"full") is None and cache.find_similar(parent, TOKENS[:4]) == (1, 3)


def test_few_continuations_are_remembered():
    cache = PrefixCache()
    for block_id in range(1, 3 * MOST_CONTINUATIONS):
        forgotten = cache.add(block_id, b"p", np.array([block_id], np.int32), None)
        assert forgotten == (
            block_id - MOST_CONTINUATIONS if block_id > MOST_CONTINUATIONS else None
        )
    assert len(cache.block_ids()) == MOST_CONTINUATIONS
    assert cache.find_similar(b"p", np.array([1], np.int32))[1] == 0
    newest = 3 * MOST_CONTINUATIONS - 1
    assert cache.find_similar(b"p", np.array([newest], np.int32)) == (newest, 1)
    for block_id in range(1, 3 * MOST_CONTINUATIONS):
        cache.discard(block_id)
    assert cache.block_ids() == set() and not cache._continuations


def test_a_full_block_is_found_by_its_hash_when_newer_continuations_came():
    cache = PrefixCache()
    cache.add(1, b"p", TOKENS[:4], b"full")
    for block_id in range(2, 2 + MOST_CONTINUATIONS):
        assert cache.add(block_id, b"p", np.array([block_id], np.int32), None) is None
    assert cache.find_similar(b"p", TOKENS[:4])[1] == 0
    assert cache.find(b"full") == 1
    cache.discard(1)
    assert cache.find(b"full") is None
