-- Comes after single.lua or cluster.lua, with reserve(), and before queue.lua.

-- Extends the owner's lease and reserves more tokens.
local function extend(ttl, n, floor)
  local last = reserve(n, floor)
  -- Never shorten a lease: see renew.lua.
  if redis.call('PTTL', KEYS[1]) < tonumber(ttl) then
    redis.call('PEXPIRE', KEYS[1], ttl)
  end
  return {1, last, redis.call('ZCARD', KEYS[2]), 1}
end
