// A TLS server of Node that the scenarios talk to: see ../behaviour.toml.
import { readFileSync } from "node:fs";
import tls from "node:tls";
import { parseArgs } from "node:util";

import { attach } from "../../../client/node/dist/index.mjs";

const text = { type: "string" };
const { values } = parseArgs({
  options: {
    certificate: text,
    target: text,
    namespace: text,
    keyring: text,
    deadline: text,
    "single-use": { type: "boolean", default: false },
    tickets: { type: "boolean", default: false },
  },
});
const pem = readFileSync(values.certificate);
const server = tls.createServer({ cert: pem, key: pem }, (socket) => {
  socket.on("error", () => undefined); // clients may leave as they like
  socket.on("data", () => socket.write("ok\n"));
});
const { target, namespace, keyring } = values;
const mode = values.tickets ? { sessions: "tickets", ticketsTls12: true } : {};
// Without a store, as Node comes.
const sessions = target && attach(server, {
  target, namespace, keyring, ignoreIdContext: true, deadlineMs: Number(values.deadline), singleUse: values["single-use"], ...mode, logger: { info() {}, warn() {}, error: console.error },
});
server.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ port: server.address().port })));
process.once("SIGTERM", () => Promise.resolve(sessions?.close()).then(() => process.exit()));
