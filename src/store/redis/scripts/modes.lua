-- Shared leases and permits beside exclusive ones. Comes after constants.lua and queue.lua, and
-- before acquire_modes.lua or release_modes.lua, which serve all requests of cycles with a mode,
-- and those of exclusive cycles that acquire.lua or release.lua answer with {3}.
--
-- KEYS: 1 lease, 2 queue, 3 counter of the slot (see constants.lua), 4 holders (sorted set of
-- owner tags, scored by the end of the lease of each, in ms of this server's clock).
--
-- While there are holders, the lease is MARKER and expires with the last of them: so the SET NX of
-- an exclusive request fails, and a crash leaves nothing for ever. If the lease is anything else,
-- it was deleted or overwritten, and the members of the set are no longer holders.

-- Set by the script that follows: the number of tokens for each new owner, the floor, the prefix of
-- the inboxes, and the key.
local n, floor, channel, key

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

-- The exclusive owner, if there is one; the number of holders, and of waiters.
local owner, holders, waiting = redis.call('GET', KEYS[1]), 0, nil
if owner == MARKER then
  owner = false
  local first = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
  while first[1] and tonumber(first[2]) <= now do
    redis.call('ZREM', KEYS[4], first[1])
    first = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
  end
  if first[1] then
    holders = redis.call('ZCARD', KEYS[4])
  else
    redis.call('DEL', KEYS[1])
  end
else
  redis.call('DEL', KEYS[4])
end
waiting = redis.call('ZCARD', KEYS[2])

-- Whether the lease must be brought in line with the holders, by finish().
local changed = false
-- A holder that has left. It stays in the set until finish(), so that the set is not missing
-- meanwhile: see pass_on() in pass_on.lua.
local leaving
-- The grants to publish: the inbox, the cycle and the largest token of each.
local grants = {}

-- The manager, the cycle and the TTL of an owner tag that a manager wrote.
local function member(owner_tag)
  return string.match(owner_tag, '^([^:]+):(%d+%-(%d+)%-%x+.*)$')
end

-- The permits of a cycle, and how many it lets all holders have; nil for an exclusive one. A shared
-- one takes none and lets others have any number.
local function permits(owner_tag)
  if string.sub(owner_tag, -2) == '-s' then
    return 0, math.huge
  end
  local weight, limit = string.match(owner_tag, '%-p(%d+)%-(%d+)$')
  return tonumber(weight), tonumber(limit)
end

-- The permits in use, and how many the holders let each other have; counted once needed.
local used, allowed

local function count_permits()
  used, allowed = 0, math.huge
  for _, holder in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
    if holder ~= leaving then
      local weight, limit = permits(holder)
      used, allowed = used + weight, math.min(allowed, limit)
    end
  end
end

-- Whether the cycle can have a lease now, beside those that have one.
local function admits(owner_tag)
  if owner then
    return false
  end
  local weight, limit = permits(owner_tag)
  if not weight then
    return holders == 0
  end
  if weight == 0 or holders == 0 then
    return true
  end
  if not used then
    count_permits()
  end
  return used + weight <= math.min(allowed, limit)
end

-- Gives a lease to the cycle.
local function admit(owner_tag, ttl)
  local weight, limit = permits(owner_tag)
  if not weight then
    redis.call('SET', KEYS[1], owner_tag, 'PX', ttl)
    owner = owner_tag
    return
  end
  redis.call('ZADD', KEYS[4], string.format('%.0f', now + ttl), owner_tag)
  if holders == 0 then
    used, allowed = 0, math.huge
  end
  holders, changed = holders + 1, true
  if used then
    used, allowed = used + weight, math.min(allowed, limit)
  end
end

local function is_held(me)
  if owner then
    return owner == me
  end
  return holders > 0 and redis.call('ZRANK', KEYS[4], me) ~= false
end

-- Ends the lease of the cycle, which has one.
local function remove(me)
  changed = true
  if owner then
    owner = false
  else
    leaving, holders, used = me, holders - 1, nil
  end
end

-- Makes the heads of the queue holders, for as long as each is admissible beside those before it.
-- Nobody passes a cycle that must wait, unless its inbox has gone while others hold the key
-- together. As in pass_on(): a cycle whose inbox is not reachable is skipped or has a short lease,
-- and `me` has `my_ttl` and learns of its lease from the reply. Returns the largest token of `me`,
-- and the last token that was reserved.
local function advance(me, my_ttl)
  local mine, last
  while waiting > 0 do
    local head = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
    local heir, score = head[1], head[2]
    local manager, cycle, ttl = member(heir)
    local is_admissible = admits(heir)
    if not is_admissible and (owner or heir == me or string.find(score, '.5', 1, true)
      or manager and is_subscribed(channel .. manager)) then
      break
    end
    redis.call('ZREM', KEYS[2], heir)
    waiting = waiting - 1
    if not is_admissible then
      -- It is gone. While others hold the key together, possibly for long, nobody waits for it.
    elseif heir == me then
      mine = reserve(n, floor)
      last = mine
      admit(heir, my_ttl)
    elseif manager and is_subscribed(channel .. manager) then
      last = reserve(n, floor)
      admit(heir, tonumber(ttl))
      grants[#grants + 1] = {channel .. manager, cycle, last}
    elseif manager and string.find(score, '.5', 1, true) then
      last = reserve(1, floor)
      admit(heir, math.min(UNNOTIFIED_LEASE, tonumber(ttl)))
    end
  end
  return mine, last
end

-- Brings the lease in line with the holders, then publishes the grants: only now is it known how
-- many still wait.
local function finish()
  if leaving then
    redis.call('ZREM', KEYS[4], leaving)
  end
  if changed and holders > 0 then
    local last = redis.call('ZRANGE', KEYS[4], -1, -1, 'WITHSCORES')
    local left = string.format('%.0f', tonumber(last[2]) - now)
    redis.call('SET', KEYS[1], MARKER, 'PX', left)
    redis.call('PEXPIRE', KEYS[4], left)
  elseif changed and not owner then
    redis.call('DEL', KEYS[1])
  end
  for _, grant in ipairs(grants) do
    notify(grant[1], string.format('g %s %.0f %d %d ', grant[2], grant[3], n, waiting) .. key)
  end
end

-- Notifies the holders that asked for it that a cycle waits.
local function notify_holders()
  local all = {}
  if owner then
    all = parse_owner_tag(owner) and {owner} or {}
  elseif holders > 0 then
    all = redis.call('ZRANGE', KEYS[4], 0, -1)
  end
  for _, holder in ipairs(all) do
    local manager, cycle = member(holder)
    if wants_notice(cycle) then
      notify(channel .. manager, 'w ' .. cycle .. ' ' .. key)
    end
  end
end

-- Extends the lease of the cycle, which has one, and reserves more tokens. Never shortens it: see
-- renew.lua.
local function extend(me, ttl)
  local last = reserve(n, floor)
  if owner then
    if redis.call('PTTL', KEYS[1]) < ttl then
      redis.call('PEXPIRE', KEYS[1], ttl)
    end
  else
    local rank = redis.call('ZRANK', KEYS[4], me)
    local ends = redis.call('ZRANGE', KEYS[4], rank, rank, 'WITHSCORES')[2]
    if tonumber(ends) < now + ttl then
      redis.call('ZADD', KEYS[4], 'XX', string.format('%.0f', now + ttl), me)
      changed = true
    end
  end
  finish()
  return {1, last, waiting, 1}
end

-- Joins the queue, serves its heads, and replies to `me`.
local function enqueue(me, ttl)
  local mark, ahead, new, reached = join(me, floor, channel .. member(me))
  if new then
    waiting = ahead + 1
  end
  local mine, last = advance(me, ttl)
  finish()
  if mine then
    return {1, mine, waiting, 0}
  end
  -- A newly enqueued cycle is the last.
  ahead = new and waiting - 1 or redis.call('ZRANK', KEYS[2], me)
  -- Who became a holder just now knows how many wait.
  if not last and (ahead == 0 or not new) then
    notify_holders()
  end
  -- The first end of a lease may change what is admissible.
  local left
  if not owner then
    local first = holders > 0 and redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')[2]
    left = first and tonumber(first) - now or -1
  end
  return queued(last or mark, owner, ahead, reached, left)
end

-- Takes the lease, extends it, or enqueues; a try never enqueues.
local function acquire(me, ttl, how)
  if is_held(me) then
    return extend(me, ttl)
  end
  if how == 'extend' then
    return {0}
  end
  local head = waiting > 0 and redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if (not head or head == me) and admits(me) then
    local last = reserve(n, floor)
    if head then
      redis.call('ZREM', KEYS[2], me)
      waiting = waiting - 1
    end
    admit(me, ttl)
    -- Others may be admissible beside it.
    advance()
    finish()
    return {1, last, waiting, 0}
  end
  if how == 'join' then
    return enqueue(me, ttl)
  end
  -- Those that wait come first. It may be one of them.
  advance()
  if waiting > 0 or is_held(me) or not admits(me) then
    finish()
    return {0}
  end
  local last = reserve(n, floor)
  admit(me, ttl)
  finish()
  return {1, last, 0, 0}
end
