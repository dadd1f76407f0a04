"""Every machine of the catalogue loads with its sources; files may build on entries; mistakes name their key."""

import pytest

from pipermoe.exchange.topology import UNLIMITED, Topology
from pipermoe.specs.errors import UserError
from pipermoe.specs.platform_file import load_platform, platform_names

FRONTIER = load_platform("frontier")


@pytest.mark.parametrize("name", platform_names())
def test_every_number_of_the_catalogue_has_its_source(name):
    platform = load_platform(name)
    curves = [f"{key}.{next(iter(platform.device.gemm))}" for key in ("gemm", "grouped_gemm", "attention")]
    keys = [f"device.{key}" for key in (*curves, "memory_bound", "kernel_seconds", "peak_flops_per_s", "memory_bytes")]
    keys += [f"levels.{level.name}.{'link' if level.link else 'cost.all_to_all'}" for level in platform.levels]
    assert [key for key in keys if platform.evidence_for(key) is None] == []
    assert {"bf16"} <= platform.device.peak_flops_per_s.keys() or "fp32" in platform.device.gemm


def test_curves_never_exceed_the_peak():
    for name in platform_names():
        device = load_platform(name).device
        for precision, curve in device.gemm.items():
            assert max(curve.rate) <= device.peak_flops_per_s[precision], name
            experts = max(max(grouped.rate) for grouped in device.grouped_gemm[precision])
            assert experts <= device.peak_flops_per_s[precision], name


def test_a_file_builds_on_catalogue_entries(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("""
        name = "mine"
        device = { base = "a100", memory_bytes = "40GiB", scale = { gemm = 0.5 } }
        host = { ranks = 4, compute_slots = 4 }
        [[levels]]
        name = "nvlink"
        ranks = 4
        [levels.link]
        topology = "fully_connected"
        bandwidth_bytes_per_s = "300GB/s"
        latency_seconds = "2us"
        collectives = "nccl-a100"
    """)
    mine, a100 = load_platform(str(file)).device, load_platform("dgx-a100").device
    assert mine.memory_bytes == 40 * 2**30
    assert mine.gemm["bf16"].rate == tuple(rate / 2 for rate in a100.gemm["bf16"].rate)
    assert mine.attention == a100.attention


def test_frontier_as_a_topology_is_its_nics_groups_and_global_links():
    topology = Topology.of_platform(FRONTIER, 8 * 256)
    assert (topology.num_nodes, topology.num_groups) == (256, 2)
    assert topology.nic[:8] == (0, 0, 1, 1, 2, 2, 3, 3)
    assert topology.nic_bandwidth == 25e9
    assert topology.global_bandwidth == pytest.approx(100e9, rel=1e-3)  # 4 links of 25 GB/s between two groups


def test_a_rack_is_a_node_of_the_exchange_where_nvlink_spans_it():
    topology = Topology.of_platform(load_platform("gb200-nvl72"), 144)
    assert (topology.num_nodes, topology.num_groups, topology.global_bandwidth) == (2, 1, UNLIMITED)


MINE = """
name = "mine"
device = "{device}"
host = {{ ranks = {host}, compute_slots = 4 }}
{levels}
"""
LEVEL = """
[[levels]]
name = "node"
ranks = {ranks}
[levels.link]
topology = "{topology}"
bandwidth_bytes_per_s = "{bandwidth}"
latency_seconds = "2us"
{more}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "h10"}, "device.base = 'h10': must be an entry of catalogue/devices; did you mean h100"),
        ({"bandwidth": "300GB"}, "levels.0.link.bandwidth_bytes_per_s = '300GB': has the unknown unit 'GB'"),
        (
            {"bandwidth": "-3GB/s"},
            "link.bandwidth_bytes_per_s = -3000000000.0: input should be greater than 0",
        ),
        ({"bandwidth": "fast"}, "must be a number with a unit"),
        ({"levels": ""}, "levels: required key is missing"),
        ({"host": 8}, "a level is missing: host.ranks = 8, and levels reach 4 ranks"),
        ({"more": "taper = 1.5"}, "levels.0.link.taper = 1.5"),
        ({"more": "tapper = 0.5"}, "levels.0.link.tapper = 0.5: unknown key; did you mean 'taper'?"),
        (
            {"more": 'collectives = "nccl"'},
            "levels.node.link.collectives = 'nccl': must be an entry of catalogue/collectives",
        ),
        ({"topology": "torus"}, "levels.0.link.topology = 'torus'"),
        ({"topology": "direct_links", "more": "links = [[0, 1, 1], [2, 3, 1]]"}, "does not connect ranks [2, 3]"),
        ({"topology": "direct_links", "more": "links = [[0, 9, 1]]"}, "names ranks [9]"),
        ({"more": "links = [[0, 1, 1]]"}, "links are given for topology = 'direct_links' and for no other"),
        ({"topology": "direct_links"}, "links are given for topology = 'direct_links' and for no other"),
    ],
)
def test_a_mistake_is_named_with_its_key(tmp_path, change, message):
    words = {"ranks": 4, "topology": "fully_connected", "bandwidth": "300GB/s", "more": "", "device": "a100", "host": 4}
    words |= change
    file = tmp_path / "mine.toml"
    file.write_text(MINE.format(**words | {"levels": words.get("levels", LEVEL.format(**words))}))
    with pytest.raises(UserError) as error:
        load_platform(str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_levels_that_do_not_nest_are_refused(tmp_path):
    levels = "".join(LEVEL.format(ranks=n, topology="fully_connected", bandwidth="1GB/s", more="") for n in (4, 6))
    file = tmp_path / "mine.toml"
    file.write_text(MINE.format(device="a100", host=4, levels=levels))
    with pytest.raises(UserError, match="ranks = 6 must hold whole blocks of 4"):
        load_platform(str(file))
