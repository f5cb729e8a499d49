#!lua flags=allow-oom,allow-cross-slot-keys
-- Count the entries behind some keys of this node, by namespace, and delete purged sessions if ARGV says so.
-- KEYS: a stream of this node.
-- ARGV: cursor of SCAN, pattern of keys, how many keys to look at (about), prefix of keys, '1' to delete, keys of streams.
-- Returns: {next cursor, then for each namespace: name, sessions, bytes of their values, tombstones, purged sessions}.
-- include namespace_mark_cluster.lua
local cursor, pattern, count, prefix, deletes = unpack(ARGV)
local scan = redis.call('SCAN', cursor, 'MATCH', pattern, 'COUNT', count)
local marks, counts, answer = {}, {}, {scan[1]}
for _, key in ipairs(scan[2]) do
  local namespace = string.match(string.sub(key, #prefix + 1), '^([a-z0-9.-]+):')
  local value = namespace and redis.pcall('GET', key)
  if type(value) == 'string' then
    if not counts[namespace] then
      counts[namespace], marks[namespace] = {0, 0, 0, 0}, namespace_mark(namespace, '?', 6)
      if type(marks[namespace]) == 'table' then return marks[namespace] end
    end
    local counted = counts[namespace]
    if value == '' then
      counted[3] = counted[3] + 1
    elseif is_purged(value, marks[namespace]) then
      counted[4] = counted[4] + 1
      if deletes == '1' then redis.call('UNLINK', key) end
    else
      counted[1], counted[2] = counted[1] + 1, counted[2] + #value - MARK_DIGITS
    end
  end
end
for namespace, counted in pairs(counts) do
  answer[#answer + 1] = namespace
  for each = 1, 4 do answer[#answer + 1] = counted[each] end
end
return answer
