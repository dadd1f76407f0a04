"""Parameters of two layers of odd sizes: no flat buffer divides by the ranks, shard borders fall inside parameters."""

EXPERTS = 4
SHAPES = {
    f"layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "attention.query.weight": (5, 7),
        "norm.weight": (7,),
        "experts.up.weight": (EXPERTS, 3, 7),
    }.items()
}
