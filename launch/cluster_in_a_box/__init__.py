"""Several nodes on one Linux machine: network namespaces with links of a set speed.

    box-n0 eth0 ---- p0 |                         each end shaped by tc's token bucket (tbf),
    box-n1 eth0 ---- p1 | bridge, in box-sw       so that a node sends and receives at the rate
    box-n2 eth0 ---- p2 |

With racks, each has a bridge of its own, and its trunk to a core bridge has a rate of its own. The
machine's own network is not touched: bridge, cables and interfaces live in namespaces only.
"""
