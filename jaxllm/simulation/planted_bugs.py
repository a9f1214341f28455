"""Bugs that a simulation must find, planted into the real source by replacing text.

``old`` must be in the file exactly once. Where code has changed and it is not, the hunt fails:
bring the entry up to date. To add a bug, add an entry.
"""

from jaxllm.simulation.bugs_of_files import BUGS_OF_FILES
from jaxllm.simulation.bugs_of_forced import BUGS_OF_FORCED
from jaxllm.simulation.bugs_of_journals import BUGS_OF_JOURNALS
from jaxllm.simulation.bugs_of_policies import BUGS_OF_POLICIES
from jaxllm.simulation.bugs_of_sharing import BUGS_OF_SHARING
from jaxllm.simulation.bugs_of_steps import BUGS_OF_STEPS

BUGS = (
    *BUGS_OF_STEPS,
    *BUGS_OF_SHARING,
    *BUGS_OF_POLICIES,
    *BUGS_OF_JOURNALS,
    *BUGS_OF_FORCED,
    *BUGS_OF_FILES,
)
