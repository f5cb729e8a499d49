/**
 * Shows the heap of a server before, during and after many handshakes, nine of ten resumed: `npm run leak --
 * [HANDSHAKES [stored|tickets]]` (100,000, stored). The clients are in the same process.
 */
import tls from "node:tls";

import { attach, Keyring } from "../src/index.js";
import { fleetKey, pem, quiet, startStore, VERSIONS, visit, type Version } from "./support.js";

type Mode = "stored" | "tickets";

const STEPS = 4;
const AT_ONCE = 4;

async function main(handshakes: number, mode: Mode): Promise<void> {
  const { target, process: store } = await startStore();
  try {
    for (const version of VERSIONS) await measure(target, version, handshakes, mode);
  } finally {
    store.kill();
  }
}

async function measure(target: string, version: Version, handshakes: number, mode: Mode): Promise<void> {
  const server = tls.createServer({ cert: pem, key: pem }, (socket) => {
    socket
      .on("error", () => undefined)
      .resume()
      .write("x");
  });
  const options = { target, namespace: "shop", keyring: Keyring.fromKeys(fleetKey), deadlineMs: 5000, logger: quiet };
  const sessions = attach(server, { ...options, sessions: mode, ticketsTls12: true });
  const port = await new Promise<number>((resolve) => {
    server.listen(0, "127.0.0.1", () => {
      resolve((server.address() as { port: number }).port);
    });
  });
  const secureContext = tls.createSecureContext({ ca: pem, minVersion: version, maxVersion: version });
  const client = async (count: number): Promise<void> => {
    let session: Buffer | undefined;
    for (let n = 0; n < count; n++) {
      const offered = n % 10 ? session : undefined;
      const ticket = version === "TLSv1.3" && !(offered && mode === "tickets"); // resuming a fleet ticket brings no new one
      session = (await visit(port, version, offered, { secureContext }, ticket)).session ?? offered;
    }
  };
  const show = async (done: number): Promise<NodeJS.MemoryUsage> => {
    await sessions.flush(10_000);
    for (let n = 0; n < 5; n++) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      globalThis.gc?.();
    }
    const usage = process.memoryUsage();
    const kilobytes = [usage.heapUsed, usage.external, usage.rss].map((bytes) => `${Math.round(bytes / 1024)} kB`);
    console.log(`${version} ${done}: heap ${kilobytes[0]}, external ${kilobytes[1]}, process ${kilobytes[2]}`);
    return usage;
  };
  await client(1000); // fills pools and caches
  await show(0);
  const usages: NodeJS.MemoryUsage[] = [];
  for (let step = 1; step <= STEPS; step++) {
    await Promise.all(Array.from({ length: AT_ONCE }, () => client(handshakes / STEPS / AT_ONCE)));
    usages.push(await show((handshakes / STEPS) * step));
  }
  const growth = (of: "heapUsed" | "rss"): string => {
    const bytes = (usages.at(-1)?.[of] ?? 0) - (usages[0]?.[of] ?? 0);
    return (bytes / (handshakes - handshakes / STEPS)).toFixed(1);
  };
  console.log(`${version}, after the first quarter: heap ${growth("heapUsed")}, process ${growth("rss")} bytes a handshake`);
  console.log(JSON.stringify(sessions.stats));
  await sessions.close();
  server.close();
}

void main(Number(process.argv[2] ?? 100_000), process.argv[3] === "tickets" ? "tickets" : "stored");
