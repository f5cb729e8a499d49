package io.github.resumed.netty;

import com.google.protobuf.Timestamp;
import io.github.resumed.v1.NamespacePurged;
import io.github.resumed.v1.SessionStoreServiceGrpc;
import io.github.resumed.v1.WatchEvent;
import io.github.resumed.v1.WatchRequest;
import io.github.resumed.v1.WatchResponse;
import io.grpc.Channel;
import io.grpc.Context;
import io.grpc.stub.StreamObserver;
import java.time.Instant;
import java.util.Optional;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;

/** Follows the purges of a namespace. A stream that ends begins again a second later, and then repeats the last purge. */
final class PurgeWatch implements StreamObserver<WatchResponse> {
    private static final long RETRY_MILLISECONDS = 1000;

    private final Channel channel;
    private final WatchRequest request;
    private final ScheduledExecutorService thread;
    private final Consumer<Optional<Instant>> purged;
    private final Context.CancellableContext context = Context.ROOT.withCancellation();
    /** Whether the stream has delivered what was in force when it began. */
    private boolean live;

    /** @param purged Gets the time before which sessions were purged, or none for all, in {@code thread}. */
    PurgeWatch(Channel channel, String namespace, ScheduledExecutorService thread, Consumer<Optional<Instant>> purged) {
        this.channel = channel;
        this.request = WatchRequest.newBuilder().setNamespace(namespace).setRemovalsOnly(true).build();
        this.thread = thread;
        this.purged = purged;
    }

    void begin() {
        live = false;
        context.run(() -> SessionStoreServiceGrpc.newStub(channel).watch(request, this));
    }

    void end() {
        context.cancel(null);
    }

    @Override
    public void onNext(WatchResponse response) {
        live |= response.getLive();
        for (WatchEvent event : response.getEventsList()) {
            if (event.hasPurged()) {
                Optional<Instant> before = before(event.getPurged());
                run(() -> purged.accept(before), 0);
            }
        }
    }

    @Override
    public void onError(Throwable error) {
        onCompleted();
    }

    @Override
    public void onCompleted() {
        if (!context.isCancelled()) run(this::begin, RETRY_MILLISECONDS);
    }

    private void run(Runnable task, long milliseconds) {
        try {
            thread.schedule(task, milliseconds, TimeUnit.MILLISECONDS);
        } catch (RejectedExecutionException closed) {
            // nothing is left to do
        }
    }

    private Optional<Instant> before(NamespacePurged purge) {
        if (purge.hasIssuedBeforeTime()) return Optional.of(instantOf(purge.getIssuedBeforeTime()));
        // One of the past does not end the secrets that were made since.
        return live || !purge.hasPurgeTime() ? Optional.empty() : Optional.of(instantOf(purge.getPurgeTime()));
    }

    private static Instant instantOf(Timestamp time) {
        return Instant.ofEpochSecond(time.getSeconds(), time.getNanos());
    }
}
