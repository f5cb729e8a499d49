/** Shows which connection of a server an event is about. */
import type { Server, TLSSocket } from "node:tls";

export type Emit = (event: string | symbol, ...values: unknown[]) => boolean;

/**
 * Returns the server as one connection sees it: what the connection emits there goes to `emit`. Node's session events do not say
 * whose they are, and an asynchronous context for each connection makes all promises of the process slower (Node 20, 22).
 */
export function viewOf(server: Server, emit: Emit): Server {
  return new Proxy(server, {
    get: (target, name): unknown => (name === "emit" ? emit : Reflect.get(target, name, target)),
  });
}

/**
 * Has a connection emit at `view` after its server's listeners: those of http and http2 servers put the server into the place of the view, before
 * tickets of TLS 1.3 are issued. A redefined property instead would make each access to the properties of a socket slower.
 */
export function keepView(socket: TLSSocket, view: Server): void {
  (socket as TLSSocket & { server: Server }).server = view;
}

/** Emits an event at a server, with `view` as the server that its listeners see. */
export function emitterOf(server: Server): (view: Server, event: string | symbol, ...values: unknown[]) => boolean {
  const { emit } = server as { emit: Emit };
  return (view, event, ...values) => emit.call(view, event, ...values);
}
