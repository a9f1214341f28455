"""Tokens that are known without sampling: their place, their blocks, their end."""

from functools import partial

from jaxllm.simulation.bug import COMMIT, FORCED, JOURNAL, SCHEDULER, Bug

_bug = partial(Bug, scenario="forced-tokens")

BUGS_OF_FORCED = (
    _bug(
        "what was drawn in a forced token's place is kept",
        COMMIT,
        "drawn = step.samples & (step.starts + step.num_new_tokens >= table.prefill_len[rows])",
        "drawn = step.samples.copy()",
    ),
    _bug("forced tokens go beyond the end", FORCED, "return forced[:count]", "return forced"),
    _bug(
        "forced tokens follow the end",
        FORCED,
        "    if check_stop(request) is not None:\n        return ()\n",
        "",
    ),
    _bug(
        "a row is not told of forced tokens",
        FORCED,
        "known.append((request.row, start, tokens))",
        "known += ()",
    ),
    _bug(
        "forced tokens have the wrong place",
        FORCED,
        "known.append((request.row, start, tokens))",
        "known.append((request.row, start + 1, tokens))",
    ),
    _bug(
        "forced tokens have no blocks",
        SCHEDULER,
        "max(num_computed + 1, int(self.rows.prefill_len[row]))",
        "num_computed + 1",
    ),
    _bug(
        "forced tokens of a row that was preempted for others",
        SCHEDULER,
        "if self.rows.request[known[0]] is not None]",
        "]",
    ),
    _bug(
        "forced tokens are not recorded",
        f"{JOURNAL}.records",
        "int32_bytes(output.token_ids), finite, output.forced)",
        "int32_bytes(output.token_ids), finite)",
    ),
)
