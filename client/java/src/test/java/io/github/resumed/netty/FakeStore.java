package io.github.resumed.netty;

import com.google.protobuf.ByteString;
import com.google.rpc.Code;
import io.github.resumed.v1.BatchOperation;
import io.github.resumed.v1.BatchRequest;
import io.github.resumed.v1.BatchResponse;
import io.github.resumed.v1.BatchResult;
import io.github.resumed.v1.GetResponse;
import io.github.resumed.v1.NamespacePurged;
import io.github.resumed.v1.PutRequest;
import io.github.resumed.v1.PutResponse;
import io.github.resumed.v1.SessionStoreServiceGrpc.SessionStoreServiceImplBase;
import io.github.resumed.v1.StoredSession;
import io.github.resumed.v1.WatchEvent;
import io.github.resumed.v1.WatchRequest;
import io.github.resumed.v1.WatchResponse;
import io.grpc.ManagedChannel;
import io.grpc.Server;
import io.grpc.Status;
import io.grpc.inprocess.InProcessChannelBuilder;
import io.grpc.inprocess.InProcessServerBuilder;
import io.grpc.stub.StreamObserver;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.CopyOnWriteArrayList;

/** A store in this process with write-once keys and purges. */
final class FakeStore extends SessionStoreServiceImplBase implements AutoCloseable {
    final Map<ByteString, ByteString> values = new HashMap<>();
    final ManagedChannel channel;
    volatile boolean down;
    private final List<StreamObserver<WatchResponse>> watchers = new CopyOnWriteArrayList<>();
    private final Server server;

    FakeStore() throws Exception {
        String name = UUID.randomUUID().toString();
        server = InProcessServerBuilder.forName(name).addService(this).build().start();
        channel = InProcessChannelBuilder.forName(name).build();
    }

    /** Removes all values and notifies watchers. */
    void purge() {
        synchronized (this) {
            values.clear();
        }
        WatchEvent event = WatchEvent.newBuilder().setPurged(NamespacePurged.getDefaultInstance()).build();
        for (StreamObserver<WatchResponse> watcher : watchers) watcher.onNext(WatchResponse.newBuilder().addEvents(event).build());
    }

    @Override
    public synchronized void batch(BatchRequest request, StreamObserver<BatchResponse> response) {
        if (down) {
            response.onError(Status.UNAVAILABLE.asRuntimeException());
            return;
        }
        BatchResponse.Builder results = BatchResponse.newBuilder();
        for (BatchOperation operation : request.getOperationsList()) results.addResults(operation.hasPut() ? put(operation.getPut()) : get(operation));
        response.onNext(results.build());
        response.onCompleted();
    }

    @Override
    public void watch(WatchRequest request, StreamObserver<WatchResponse> response) {
        watchers.add(response);
        response.onNext(WatchResponse.newBuilder().setLive(true).build());
    }

    private BatchResult get(BatchOperation operation) {
        GetResponse.Builder found = GetResponse.newBuilder();
        ByteString value = values.get(operation.getGet().getKey());
        if (value != null) found.setSession(StoredSession.newBuilder().setValue(value));
        return BatchResult.newBuilder().setGet(found).build();
    }

    private BatchResult put(PutRequest put) {
        ByteString before = values.putIfAbsent(put.getKey(), put.getValue());
        if (before == null || before.equals(put.getValue())) return BatchResult.newBuilder().setPut(PutResponse.getDefaultInstance()).build();
        com.google.rpc.Status error = com.google.rpc.Status.newBuilder().setCode(Code.ALREADY_EXISTS_VALUE).build();
        return BatchResult.newBuilder().setError(error).build();
    }

    @Override
    public void close() {
        channel.shutdownNow();
        server.shutdownNow();
    }
}
