-- Shared by the scripts that acquire and release. Before it comes constants.lua.

-- The manager, the cycle and the TTL of an owner tag; nil for a value that another library wrote.
-- An owner tag is `<manager>:<cycle>`, a cycle `<number>-<ttl>-<code>`.
local function parse_owner_tag(owner_tag)
  local manager, cycle, ttl = string.match(owner_tag, '^([%w%.%-]+):(%d+%-(%d+)%-%x%x%x%x%x%x%x%x)$')
  -- `<host>-<process id>-<16 digits>`, matched from the end: a single pattern would try each dash.
  if manager and string.find(manager, '^%-%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x$', -17)
    and string.find(string.sub(manager, -29, -18), '.%-%d+$') then
    return manager, cycle, ttl
  end
end

-- Whether the owner of a cycle asked to be notified when a waiter enqueues: its number is even.
local function wants_notice(cycle)
  return tonumber(string.match(cycle, '(%d)%-')) % 2 == 0
end

-- The most bytes of an owner in a reply. No owner tag is longer, but the value of another
-- library may have any length.
local OWNER_MAX = 512

-- The reply to a queued cycle: 2, mark, remaining TTL of the owner (-1: no expiry), the owner, how
-- many are ahead, whether a grant would reach it. The owner is null if it is known to be a manager.
-- Otherwise the client parses it, which takes longer here. `left` is the TTL, if known.
local function queued(mark, owner, ahead, reached, left)
  left = left and tonumber(left) or redis.call('PTTL', KEYS[1])
  -- Formatted here: the server would use 17 digits, which takes several times as long.
  redis.call('PEXPIRE', KEYS[2], string.format('%d', math.max(left, 0) + QUEUE_GRACE))
  return {2, mark, left, owner and string.sub(owner, 1, OWNER_MAX), ahead, reached and 1 or 0}
end

-- Enqueues the cycle unless it is queued already. Returns its mark, how many are ahead, whether it
-- was newly added, and whether a grant would reach its inbox, which is not checked if it is known.
local function join(me, floor, inbox, known)
  local mark = reserve('1', floor)
  local reached = known or is_subscribed(inbox)
  local score = reached and string.format('%.0f', mark) or string.format('%.1f', mark + 0.5)
  if redis.call('ZADD', KEYS[2], 'NX', score, me) == 1 then
    return mark, redis.call('ZCARD', KEYS[2]) - 1, true, reached
  end
  local rank = redis.call('ZRANK', KEYS[2], me)
  if not reached then
    local joined = redis.call('ZRANGE', KEYS[2], rank, rank, 'WITHSCORES')[2]
    if not string.find(joined, '.5', 1, true) then
      redis.call('ZADD', KEYS[2], 'XX', joined .. '.5', me)
    end
  end
  return mark, rank, false, reached
end

-- Enqueues the cycle behind an owner that is not a marker, and replies to it.
local function enqueue_behind(owner, me, floor, channel, key, known)
  local mark, ahead, new, reached = join(me, floor, channel .. string.match(me, '^[^:]+'), known)
  -- For the first waiter, and again whenever a waiter retries.
  if ahead == 0 or not new then
    local manager, cycle = parse_owner_tag(owner)
    if manager and wants_notice(cycle) then
      notify(channel .. manager, 'w ' .. cycle .. ' ' .. key)
    end
  end
  return queued(mark, owner, ahead, reached)
end

