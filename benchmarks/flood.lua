-- requests random names of 16 characters that do not exist, below the given URL
function init(args) math.randomseed(os.time()) end
function request()
  return wrk.format("GET", string.format("%s/%08x%08x.jpg", wrk.path, math.random(2^31), math.random(2^31)))
end
