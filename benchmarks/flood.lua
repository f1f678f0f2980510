-- random names that nobody has, of 16 characters
function init(args) math.randomseed(os.time()) end
function request()
  return wrk.format("GET", string.format("/static/uploads/%08x%08x.jpg", math.random(2^31), math.random(2^31)))
end
