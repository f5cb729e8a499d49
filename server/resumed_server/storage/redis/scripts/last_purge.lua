#!lua flags=allow-oom,allow-cross-slot-keys
-- Return the marks of a namespace and the states beside streams of this node, combined. A replica refuses this: see get.lua.
-- KEYS: none, since the streams are in several slots of a cluster.
-- ARGV: namespace, keys of streams.
-- Returns: {mark of its purges or '', milliseconds since the last one, mark of the states or ''}.
-- include marks.lua
local LONGEST_TTL_MILLISECONDS = 604800000

local purge, state, left = '', '', 0
for each = 2, #ARGV do
  local key = ARGV[each] .. ARGV[1]
  purge = latest(purge, redis.call('GET', key))
  state = latest(state, redis.call('GET', ARGV[each] .. '!'))
  left = math.max(left, redis.call('PTTL', key))
end
return {purge, LONGEST_TTL_MILLISECONDS - left, state}
