"""Pairs with planted truth: bases whose path is known by construction, and what is done to them.

`bases` trains bases in which only named heads carry the steps to the answer; `cuts` severs that path at a named Unit;
`disguise` hides where (drift, decoys); `pairs` puts them together, checks each pair both ways, and keeps them.
"""
