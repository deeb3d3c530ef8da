-- Shared by claim.lua and claim_shared.lua, which follow.

-- Raises a counter to at least this value, and returns what it was before. A counter below the
-- floor was lost: see reserve in single.lua.
local function raise(counter, least, floor)
  local count = tonumber(redis.call('GET', counter) or '0')
  if count < floor then
    local time = redis.call('TIME')
    count = math.max(floor, (tonumber(time[1]) - 1735689600) * 8000000 + tonumber(time[2]) * 8)
  end
  redis.call('SET', counter, string.format('%.0f', math.max(count, least)))
  return count
end
