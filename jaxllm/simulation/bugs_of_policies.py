"""Who goes first, and who makes way."""

from jaxllm.simulation.bug import ASIDE, FAIR, PRIORITY, QUEUE, ROWS, SCHEDULER, SHARES, WAY, Bug

BY_ARRIVAL = "merge(self._preempted, self._new.values(), key=_arrival)"

COME_BACK = """\
            self.remove(request.request_id)
            self._waiting.prepend(request)
"""

BUGS_OF_POLICIES = (
    Bug(
        "the worst priority goes first",
        PRIORITY,
        "self._priorities[0]",
        "self._priorities[-1]",
        scenario="priorities",
    ),
    Bug(
        "equals make way",
        WAY,
        ") <= policy.rank(request)",
        ") < policy.rank(request)",
        scenario="priorities",
    ),
    Bug("nobody makes way", WAY, "        victims += going\n", "", scenario="priorities"),
    Bug(
        "the best makes way",
        WAY,
        "rows.victims()[::-1]].tolist()",
        "rows.victims()].tolist()",
        scenario="priorities",
    ),
    Bug(
        "ranks do not count in rows",
        ROWS,
        "np.lexsort((self.arrival[rows], self.rank[rows]))",
        "np.argsort(self.arrival[rows])",
        scenario="priorities",
    ),
    Bug(
        "the preempted come after the new",
        QUEUE,
        BY_ARRIVAL,
        "iter((*self._new.values(), *self._preempted))",
    ),
    Bug(
        "nothing is charged",
        FAIR,
        "+= num_tokens / self._weights.get(tenant, 1.0)",
        "+= 0.0",
        scenario="tenants",
    ),
    Bug(
        "long prefills leave nothing",
        SHARES,
        "budget - min(wanted_by_short, budget // 2)",
        "budget",
    ),
    Bug(
        "the rest of a step is given twice",
        SHARES,
        'turn."""\n        chunk = min(num_tokens, self.left)\n        self.left -= chunk\n',
        'turn."""\n        chunk = min(num_tokens, self.left)\n',
    ),
    # Standing aside
    Bug(
        "nobody stands aside",
        ASIDE,
        "if num_common > num_cached and",
        "if num_common > request.num_tokens and",
        answers=False,
        scenario="aside",
    ),
    Bug(
        "who stood aside is forgotten",
        ASIDE,
        f"self._waits(request)]:\n{COME_BACK}",
        "self._waits(request)]:\n            self.remove(request.request_id)\n",
        scenario="aside",
    ),
    Bug(
        "who stands aside waits for one that has left",
        ASIDE,
        "if leader.row is None or not self._rows.num_to_prefill(leader.row) > 0:",
        "if False:",
        scenario="aside",
    ),
    Bug(
        "who leaves while standing aside comes back",
        SCHEDULER,
        "if self.aside.remove(request.request_id) is None:",
        "if True:",
        scenario="aside",
    ),
    Bug(
        "who stands aside is not there after a failure",
        ASIDE,
        f"list(self):\n{COME_BACK}",
        "list(self):\n            self.remove(request.request_id)\n",
        answers=False,
        scenario="aside",
    ),
    Bug(
        "limits are ignored",
        SHARES,
        "if num_decode and token_limit is not None:",
        "if not num_decode and token_limit is not None:",
        scenario="limits",
    ),
)
