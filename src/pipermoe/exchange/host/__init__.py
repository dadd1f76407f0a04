"""One rank's part of an exchange plan on host memory: through shared memory inside a node, over sockets between nodes.

`program` lowers a plan to what one rank does; `loop` runs that in Python, `native` runs the same in C. Both use the
connections of `shared_memory` and `sockets`. No torch here.
"""
