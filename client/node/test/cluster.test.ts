/** A server whose workers are processes of a cluster. */
import assert from "node:assert/strict";
import cluster from "node:cluster";
import { once } from "node:events";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { test } from "node:test";

import { certificate, connect, fleetKey, keyringFile, sessionOf, sharedStore, skip, VERSIONS } from "./support.js";

test("the workers of a cluster resume each other's sessions", { skip }, async () => {
  const { target } = await sharedStore();
  cluster.setupPrimary({ exec: join(__dirname, "cluster-worker.js"), silent: true });
  cluster.schedulingPolicy = cluster.SCHED_RR; // so that one worker after the other gets a connection
  const environment = { CERTIFICATE: certificate, TARGET: target, KEYRING: keyringFile(fleetKey) };
  const workers = [cluster.fork(environment), cluster.fork(environment)];
  try {
    const listening = workers.map(async (worker) => (await once(worker, "listening"))[0] as AddressInfo);
    const [{ port }] = (await Promise.all(listening)) as [AddressInfo];
    for (const version of VERSIONS) {
      let session: Buffer | undefined;
      for (let n = 0; n < 10; n++) {
        const socket = await connect(port, version, session);
        assert.equal(socket.isSessionReused(), n > 0, `${version}, connection ${n}`);
        session = sessionOf(socket);
        socket.destroy();
      }
    }
  } finally {
    for (const worker of workers) worker.kill();
  }
});
