-- Marks: a time (microseconds since the epoch) and an epoch, both as decimal digits, so that they sort as numbers do.
-- A stored session begins with one, and so do the mark of a purge and the state of a stream (see admission.py).
local TIME_DIGITS, EPOCH_DIGITS = 16, 10
local MARK_DIGITS = TIME_DIGITS + EPOCH_DIGITS

-- Return the mark that combines two marks or states: the later time and the later epoch. '' and false are no mark.
local function latest(one, other)
  if not one or one == '' then return other and string.sub(other, 1, MARK_DIGITS) or '' end
  if not other or other == '' then return string.sub(one, 1, MARK_DIGITS) end
  local time, epoch = string.sub(one, 1, TIME_DIGITS), string.sub(one, TIME_DIGITS + 1, MARK_DIGITS)
  local time2, epoch2 = string.sub(other, 1, TIME_DIGITS), string.sub(other, TIME_DIGITS + 1, MARK_DIGITS)
  return (time2 > time and time2 or time) .. (epoch2 > epoch and epoch2 or epoch)
end

-- Return whether a stored value is a session (and no tombstone) from before a mark.
local function is_purged(value, mark)
  return value and value ~= '' and (string.sub(value, 1, TIME_DIGITS) < string.sub(mark, 1, TIME_DIGITS)
    or string.sub(value, TIME_DIGITS + 1, MARK_DIGITS) < string.sub(mark, TIME_DIGITS + 1))
end
