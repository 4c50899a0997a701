// Loaded first: nothing may speak to anything outside this machine, be it telemetry or a catalogue.
import net from "node:net";

const LOOPBACK = new Set([undefined, "127.0.0.1", "::1", "localhost"]);
const connect = net.Socket.prototype.connect;

net.Socket.prototype.connect = function (...given) {
  const options = Array.isArray(given[0]) ? given[0][0] : given[0];
  const host = typeof options === "object" ? options.host : undefined;
  if (!LOOPBACK.has(host)) {
    console.log(JSON.stringify({ outside: host }));
    throw new Error(`a test may not speak to ${host}`);
  }
  return connect.apply(this, given);
};
