#!lua flags=allow-oom,allow-cross-slot-keys
-- Compare the states beside the streams with the process that runs this, and begin a new epoch if it is another process
-- than before; see admission.py. States that moved here from another node are combined with those of this node.
-- KEYS: none, since the states are on several nodes of a cluster.
-- ARGV: keys of states.
-- Returns: 1 if a new epoch has begun, else 0.
-- include marks.lua
local STATE_HEAD = MARK_DIGITS + EPOCH_DIGITS

local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') or ''
local time = redis.call('TIME')
local here, known, same = {}, false, false
local mark, counter = string.rep('0', MARK_DIGITS), string.format('%0' .. EPOCH_DIGITS .. '.0f', time[1])
for _, key in ipairs(ARGV) do
  local state = redis.pcall('GET', key)
  if type(state) ~= 'table' then
    here[key] = state or ''
    if state then
      known, same = true, same or string.sub(state, STATE_HEAD + 1) == run
      mark = latest(mark, state)
      local another = string.sub(state, MARK_DIGITS + 1, STATE_HEAD)
      if another >= counter then counter = another end
    end
  elseif not string.find(state['err'], 'non local key', 1, true) then
    return state
  end
end
local changed = known and not same
if changed then
  counter = string.format('%0' .. EPOCH_DIGITS .. '.0f', counter + 1)
  mark = string.format('%0' .. TIME_DIGITS .. '.0f', time[1] * 1e6 + time[2]) .. counter
end
for key, state in pairs(here) do
  if state ~= mark .. counter .. run and (changed or string.sub(state, STATE_HEAD + 1) ~= run) then
    redis.call('SET', key, mark .. counter .. run)
  end
end
return changed and 1 or 0
