import pytest

from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import Request
from jaxllm.core.row_table import RowTable
from tests.fakes.plans import make_request


def table_with(*max_tokens: int) -> RowTable:
    table = RowTable(4)
    for i, n in enumerate(max_tokens):
        request = Request(make_request(f"r{i}", 3, n), i, 64)
        request.row = table.join(request)
    return table


def test_lowest_free_row_first():
    table = table_with(4, 4, 4)
    table.leave(1)
    table.leave(0)
    request = Request(make_request("new"), 9, 64)
    assert table.join(request) == 0
    assert table.num_running == 2


def test_a_tenancy_number_is_never_used_again():
    table = table_with(4)
    first = table.tenancy[0]
    table.leave(0)
    table.join(Request(make_request("new"), 9, 64))
    assert table.tenancy[0] not in (first, -1)


def test_free_rows_are_due_for_nothing():
    table = table_with(4)
    table.leave(0)
    for rows in (table.running_rows(), table.decoding_rows(), table.prefilling_rows()):
        assert rows.size == 0
    with pytest.raises(InvariantError):
        table.leave(0)


def test_a_row_prefills_then_decodes_then_awaits_its_end():
    table = table_with(2)
    assert table.prefilling_rows().tolist() == [0] and table.decoding_rows().size == 0
    table.num_computed[0] = 3
    assert table.prefilling_rows().size == 0 and table.decoding_rows().tolist() == [0]
    assert table.num_in_flight(0) == 1
    table.num_computed[0] = 4  # the second and last token is being sampled
    assert table.decoding_rows().size == 0
    assert table.num_in_flight(0) == 2


def test_a_request_without_output_never_decodes():
    table = table_with(0)
    table.num_computed[0] = 3
    assert table.decoding_rows().size == 0
    assert table.num_in_flight(0) == 0


def test_rows_that_await_their_end_are_no_victims():
    table = table_with(4, 4, 1)
    table.num_computed[:3] = 3
    assert table.victims()[0] == 1


def test_crossing_rows_are_ordered_by_age():
    table = RowTable(4)
    for arrival in (5, 2):
        table.join(Request(make_request(f"r{arrival}", 4), arrival, 64))
    table.num_computed[:2] = table.capacity[:2] = 4
    assert table.crossing_rows().tolist() == [1, 0]
    table.capacity[1] = 8
    assert table.crossing_rows().tolist() == [0]
