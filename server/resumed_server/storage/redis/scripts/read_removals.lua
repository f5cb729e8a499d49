#!lua flags=allow-oom,allow-cross-slot-keys
-- Read lasting removals of a namespace beside streams of this node. SCAN returns each member that is there from the
-- beginning to the end, also if others are added and deleted. A replica refuses this: see get.lua.
-- KEYS: none, since a script with keys would be redirected to a node where the cursor means nothing.
-- ARGV: namespace, how many to read (about), cursor in the set beside the first stream, keys of streams.
-- Returns: {number of sets that were read whole, cursor in the next one, then for each removal: key, milliseconds left}.
-- include removals.lua
local now, count = milliseconds(), tonumber(ARGV[2])
local answer = {0, ARGV[3]}
for each = 4, #ARGV do
  local scan = redis.call('ZSCAN', removals_of(ARGV[each], ARGV[1]), answer[2], 'COUNT', count)
  local found = scan[2]
  for at = 1, #found, 2 do
    local left = tonumber(found[at + 1]) - now
    if left > 0 then
      answer[#answer + 1] = found[at]
      answer[#answer + 1] = left
    end
  end
  answer[2] = scan[1]
  if scan[1] ~= '0' then return answer end
  answer[1] = answer[1] + 1
  if #answer >= 2 * count then return answer end
end
return answer
