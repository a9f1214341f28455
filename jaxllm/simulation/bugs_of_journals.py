"""What a journal forgets, so that a replay would decide otherwise or go on with other tokens."""

from functools import partial

from jaxllm.simulation.bug import JOURNAL, Bug

WRITER, RECORDS, REPLAY = f"{JOURNAL}.core", f"{JOURNAL}.records", f"{JOURNAL}.replay"

_bug = partial(Bug, scenario="journals")

BUGS_OF_JOURNALS = (
    _bug("aborts are not recorded", WRITER, "self._journal.write(Aborted(self._now(), names))", ""),
    _bug(
        "the policy is not recorded",
        WRITER,
        "scheduling or SchedulingConfig()",
        "SchedulingConfig()",
    ),
    Bug(
        "limits are not recorded",
        WRITER,
        "self.scheduler.plan, self._now(), self._last_limit",
        "self.scheduler.plan, self._now(), None",
        scenario="limits",
    ),
    _bug(
        "failures are not recorded",
        WRITER,
        "self._journal.write(Failed(self._now(), where, text[:MAX_ERROR_CHARS]))",
        "",
    ),
    _bug(
        "rows that were not finite are not recorded",
        RECORDS,
        'b"" if output.finite.all() else output.finite.tobytes()',
        'b""',
    ),
    _bug(
        "tokens are recorded in another order",
        RECORDS,
        "int32_bytes(output.token_ids)",
        "int32_bytes(output.token_ids[::-1])",
    ),
)
