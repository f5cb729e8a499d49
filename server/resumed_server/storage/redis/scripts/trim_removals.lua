#!lua flags=allow-oom,allow-cross-slot-keys
-- Delete lasting removals of a namespace that are over, beside streams of this node.
-- KEYS: none, since the sets are in several slots of a cluster.
-- ARGV: namespace, how many to delete of each set at most, keys of streams.
-- Returns: number of removals that remain.
-- include removals.lua
local left = 0
for each = 3, #ARGV do
  local removals = removals_of(ARGV[each], ARGV[1])
  trim_removals(removals, ARGV[2])
  left = left + redis.call('ZCARD', removals)
end
return left
