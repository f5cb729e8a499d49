/** A worker of cluster.test.ts: a server with sessions in the store. */
import { readFileSync } from "node:fs";
import tls from "node:tls";

import { attach } from "../src/index.js";

const { CERTIFICATE = "", TARGET = "", KEYRING = "" } = process.env;
const pem = readFileSync(CERTIFICATE);
const server = tls.createServer({ cert: pem, key: pem }, (socket) => {
  socket
    .on("error", () => undefined)
    .resume()
    .write("x");
});
attach(server, { target: TARGET, namespace: "cluster", keyring: KEYRING, deadlineMs: 5000 });
server.listen(0, "127.0.0.1");
