import pytest

from pipermoe.specs.units import (
    format_bytes,
    format_number,
    format_seconds,
    option_bytes,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bytes, "80GiB", 80 * 2**30),
        (parse_bytes, "64 GB", 64 * 10**9),
        (parse_bytes, "512 B", 512),
        (parse_bytes, "1.5MiB", 3 * 2**19),
        (parse_bandwidth, "400Gb/s", 50e9),
        (parse_bandwidth, "450 GB/s", 450e9),
        (parse_bandwidth, "3.35TB/s", 3.35e12),
        (parse_flops, "989TFLOP/s", 989e12),
        (parse_flops, "19.5 TFLOPS", 19.5e12),
        (parse_seconds, "2us", 2e-6),
        (parse_seconds, "1.5 ms", 1.5e-3),
        (parse_seconds, "3d", 3 * 86400.0),
    ],
)
def test_a_quantity_is_read_as_people_write_it(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_bytes, "80 apples"),
        (parse_bytes, "GiB"),
        (parse_bandwidth, "4Gb"),
        (parse_flops, "1e12/s"),
        (parse_seconds, "2 weeks"),
    ],
)
def test_an_unknown_unit_is_refused_with_an_example(parse, text):
    with pytest.raises(ValueError, match=r"unit|accepted"):
        parse(text)


def test_a_plain_number_stays_what_it_is():
    assert parse_bytes(12) == 12
    assert parse_seconds(0.5) == 0.5


def test_numbers_are_printed_in_the_unit_a_reader_expects():
    assert [format_bytes(n) for n in (12, 1536, 21 * 2**30)] == ["12 B", "1.50 KiB", "21.00 GiB"]
    assert [option_bytes(n) for n in (12, 100 * 2**30, 100 * 2**30 + 1)] == ["1MiB", "100GiB", "102401MiB"]
    assert [format_seconds(n) for n in (2.5, 0.0123, 4e-6)] == ["2.5 s", "12.3 ms", "4 µs"]


@pytest.mark.parametrize(
    ("number", "said"), [(1, "1 rank"), (0, "0 ranks"), (2048, "2,048 ranks"), (1.0, "1 rank"), (1.6283, "1.63 ranks")]
)
def test_one_thing_is_not_said_to_be_several(number, said):
    assert format_number(number, "rank") == said
