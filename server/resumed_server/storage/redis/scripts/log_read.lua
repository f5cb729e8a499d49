#!lua flags=no-writes,allow-cross-slot-keys
-- Read changes from streams of this node.
-- KEYS: the first stream.
-- ARGV: how many changes to read of each, then for each stream: its key, the id to begin after, the id to end with.
-- Returns: for each stream {lineage, id of the oldest change, changes as XRANGE has them}; {'', '0-0', {}} if there is none.
-- include lineage.lua
local found = {}
for each = 2, #ARGV, 3 do
  local stream = ARGV[each]
  local first = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
  found[#found + 1] = first and {lineage(stream), first[1],
    redis.call('XRANGE', stream, '(' .. ARGV[each + 1], ARGV[each + 2], 'COUNT', ARGV[1])} or {'', '0-0', {}}
end
return found
