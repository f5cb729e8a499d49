#!lua flags=allow-oom
-- Move the mark of a namespace, and raise the counter of the state beside it to the epoch of the mark. The mark is
-- written even if it stays, so that WAIT has something for replicas to acknowledge.
-- KEYS: the mark, the state.
-- ARGV: a mark.
-- Returns: the mark that holds now.
-- include marks.lua
local LONGEST_TTL_MILLISECONDS = 604800000
local STATE_HEAD = MARK_DIGITS + EPOCH_DIGITS

local mark, state = latest(redis.call('GET', KEYS[1]), ARGV[1]), redis.call('GET', KEYS[2])
redis.call('SET', KEYS[1], mark, 'PX', LONGEST_TTL_MILLISECONDS)
local epoch = string.sub(mark, TIME_DIGITS + 1)
if state and string.sub(state, MARK_DIGITS + 1, STATE_HEAD) < epoch then
  redis.call('SET', KEYS[2], string.sub(state, 1, MARK_DIGITS) .. epoch .. string.sub(state, STATE_HEAD + 1))
end
return mark
