"""Scheduling policies by name: one class and one line each."""

from collections.abc import Callable

from jaxllm.config.scheduling import SchedulingConfig
from jaxllm.core.policies.fair import FairPolicy
from jaxllm.core.policies.fcfs import FCFSPolicy
from jaxllm.core.policies.policy import SchedulingPolicy
from jaxllm.core.policies.priority import PriorityPolicy

POLICIES: dict[str, Callable[[SchedulingConfig], SchedulingPolicy]] = {
    "fcfs": lambda config: FCFSPolicy(),
    "priority": lambda config: PriorityPolicy(),
    "fair": lambda config: FairPolicy(config.weight_by_tenant()),
}
