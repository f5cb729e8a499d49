/**
 * Shows the heap of a server before, during and after many handshakes, nine of ten resumed: `npm run leak --
 * [HANDSHAKES [stored|tickets]]` (100,000, stored). The clients are in the same process.
 */
import tls from "node:tls";

import { attach, Keyring } from "../src/index.js";
import { fleetKey, pem, quiet, startStore, VERSIONS, visit } from "./support.js";

const STEPS = 4;
const AT_ONCE = 4;

async function main(handshakes: number, mode: "stored" | "tickets"): Promise<void> {
  const { target, process: store } = await startStore();
  for (const version of VERSIONS) {
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
    const client = async (count: number): Promise<void> => {
      let session: Buffer | undefined;
      for (let n = 0; n < count; n++) session = (await visit(port, version, n % 10 ? session : undefined)).session;
    };
    const show = async (done: number): Promise<void> => {
      await sessions.flush(10_000);
      for (let n = 0; n < 5; n++) {
        await new Promise((resolve) => setTimeout(resolve, 100));
        globalThis.gc?.();
      }
      const { heapUsed, external, rss } = process.memoryUsage();
      const kilobytes = [heapUsed, external, rss].map((bytes) => `${Math.round(bytes / 1024)} kB`);
      console.log(`${version} ${done}: heap ${kilobytes[0]}, external ${kilobytes[1]}, process ${kilobytes[2]}`);
    };
    await client(1000); // fills pools and caches
    await show(0);
    for (let step = 1; step <= STEPS; step++) {
      await Promise.all(Array.from({ length: AT_ONCE }, () => client(handshakes / STEPS / AT_ONCE)));
      await show((handshakes / STEPS) * step);
    }
    console.log(JSON.stringify(sessions.stats));
    await sessions.close();
    server.close();
  }
  store.kill();
}

void main(Number(process.argv[2] ?? 100_000), process.argv[3] === "tickets" ? "tickets" : "stored");
