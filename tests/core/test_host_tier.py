from jaxllm.core.host_tier import HostTier


def test_the_least_recently_used_makes_way():
    tier = HostTier(2)
    assert [tier.put(b"a"), tier.put(b"b")] == [0, 1]
    assert tier.get(b"a") == 0
    tier.step_made()
    assert tier.put(b"c") == 1
    assert b"a" in tier and b"b" not in tier and len(tier) == 2


def test_what_is_there_is_not_written_again():
    tier = HostTier(2)
    tier.put(b"a")
    assert tier.put(b"a") is None and len(tier) == 1


def test_what_a_step_reads_is_not_overwritten_by_it():
    tier = HostTier(1)
    tier.put(b"a")
    tier.get(b"a")
    assert tier.put(b"b") is None and b"a" in tier
    tier.step_made()
    assert tier.put(b"b") == 0 and b"a" not in tier


def test_no_slots_hold_nothing():
    assert HostTier(0).put(b"a") is None
