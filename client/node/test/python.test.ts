/** Sessions negotiated by Python resume here, and back. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { test, type TestContext } from "node:test";

import { certificate, fleetKey, frontend, keyringFile, renamed, sharedStore, skip, total, VERSIONS, visit } from "./support.js";

/** A frontend of the repository's Python client, on a free port. */
async function pythonFrontend(context: TestContext, target: string, stack: string): Promise<number> {
  const python = join(dirname(process.env.RESUMED_COMMAND ?? "resumed"), "python");
  const child = spawn(
    python,
    ["-m", "resumed_server.cli.demo.frontend", "--name", "python", "--stack", stack, "--certificate", certificate]
      .concat(["--target", target, "--namespace", "shop", "--keyring", keyringFile(fleetKey)])
      .concat(["--accept-foreign-ids", "--puts", "wait", "--deadline", "5"]),
    { stdio: ["ignore", "pipe", "inherit"] },
  );
  context.after(() => child.kill());
  const ended = once(child, "exit").then(([status]) => Promise.reject(new Error(`the frontend ended: ${String(status)}`)));
  ended.catch(() => undefined); // it ends with the test as well
  const [line] = (await Promise.race([once(createInterface(child.stdout), "line"), ended])) as [string];
  return (JSON.parse(line) as { port: number }).port;
}

for (const stack of ["ssl", "pyopenssl"]) {
  for (const version of VERSIONS) {
    test(`sessions go from Python (${stack}) to Node and back (${version})`, { skip }, async (context) => {
      const { target } = await sharedStore();
      const node = await frontend(context, target, { ignoreIdContext: true });
      const python = await pythonFrontend(context, target, stack);
      for (const ports of [
        [python, node.port, python, node.port],
        [node.port, python, node.port, python],
      ]) {
        let session: Buffer | undefined;
        for (const [n, port] of ports.entries()) {
          const seen = await visit(port, version, session);
          assert.equal(seen.resumed, n > 0, `connection ${n}: ${JSON.stringify(node.sessions.stats)}`);
          session = seen.session;
        }
      }
      const { hits, foreignHits } = node.sessions.stats;
      // In TLS 1.2 a session stays its issuer's; in TLS 1.3 each resumption issues another one.
      assert.deepEqual([total(hits), total(foreignHits)], [3, version === "TLSv1.3" ? 3 : 2]);
      const { session } = await visit(python, version);
      assert(!(await visit(node.port, version, renamed(session, "bank.example"), { servername: "bank.example" })).resumed);
      assert.deepEqual(node.sessions.stats.misses, { "server-name-mismatch": 1 });
    });
  }
}
